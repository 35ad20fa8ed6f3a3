import math

import pytest
import torch

from hf_devft.federation.heterogeneity.staleness import late_weights


def test_the_papers_weights():
    mean, late = torch.tensor([1.0, 0.0]), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    weights = late_weights([mean, mean], 2, late, [1, 3])
    assert weights[0] == pytest.approx(0.65 / 2 + 0), "it moves nothing"
    assert weights[1] == pytest.approx(0.65 / 4 + 0.35 * (1 - math.exp(-1))), "it moves the mean most"


def test_older_updates_count_less():
    update = [torch.ones(2)]
    weights = [late_weights([torch.zeros(2) + 0.5], 1, update, [age])[0] for age in range(1, 5)]
    assert weights == sorted(weights, reverse=True)
    assert late_weights([None], 0, update, [3]) == [1 / 4]
