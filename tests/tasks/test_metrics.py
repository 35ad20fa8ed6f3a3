import math

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_devft.tasks.metrics import ExactMatch, LanguageModelMetrics, Perplexity, TokenAccuracy, reduce_logits


def test_metrics_are_evaluates():
    assert all(issubclass(metric, evaluate.Metric) for metric in (ExactMatch, Perplexity, TokenAccuracy))


def test_exact_match_ignores_white_space_at_the_ends():
    result = ExactMatch().compute(predictions=[" 4", "red", "a b"], references=["4\n", "blue", "ab"])
    assert result == {"exact_match": pytest.approx(1 / 3)}


def test_token_accuracy_counts_labels_only():
    assert TokenAccuracy().compute(predictions=[1, 2, 3], references=[1, -100, 4]) == {"token_accuracy": 0.5}


def test_perplexity_is_the_exponential_of_the_mean():
    result = Perplexity().compute(predictions=[1.0, 3.0, 9.0], references=[5, 5, -100])
    assert result == {"perplexity": pytest.approx(math.exp(2))}


def test_reduced_logits_give_what_the_full_ones_say():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[:, :2] = -100
    output = EvalPrediction([array.numpy() for array in reduce_logits(logits, labels)], labels.numpy())
    result = LanguageModelMetrics()(output)
    shifted, targets = logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(shifted, targets)
    assert result["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    right = (shifted.argmax(-1) == targets)[targets != -100]
    assert result["token_accuracy"] == pytest.approx(np.mean(right.numpy()))
