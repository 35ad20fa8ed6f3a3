import copy

import pytest
import torch
from conftest import tiny_llama

from hf_devft.models.base_difference import base_difference
from hf_devft.models.streaming import load_base


@pytest.fixture
def newer():
    """One layer's weights grown by 10 %."""
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        for parameter in model.model.layers[2].parameters():
            parameter *= 1.1
    return model


def test_the_difference_is_where_it_is(newer):
    found = base_difference(tiny_llama(), newer)
    assert found.layers == pytest.approx([0, 0, 0.1, 0], abs=1e-5)
    assert found.shared == 0
    assert 0 < found.overall < 0.1
    assert "layer 2" in str(found)
    assert base_difference(newer, newer).overall == 0


def test_bases_that_are_still_in_their_checkpoints(newer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "old")
    newer.save_pretrained(tmp_path / "new")
    old, new = (load_base(str(tmp_path / name)) for name in ("old", "new"))
    assert base_difference(old, new) == base_difference(tiny_llama(), newer)


def test_bases_of_another_shape():
    with pytest.raises(ValueError, match=r"layers\.4.*None in the old one"):
        base_difference(tiny_llama(), tiny_llama(layers=5))
