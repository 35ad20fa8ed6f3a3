import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_devft.tasks.predictions import language_model_metrics, reduce_logits


def test_reduced_logits_give_what_the_full_ones_say():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[:, :2] = -100
    output = EvalPrediction([array.numpy() for array in reduce_logits(logits, labels)], labels.numpy())
    result = language_model_metrics(output)
    shifted, targets = logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(shifted, targets)
    assert result["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    right = (shifted.argmax(-1) == targets)[targets != -100]
    assert result["token_accuracy"] == pytest.approx(np.mean(right.numpy()))
