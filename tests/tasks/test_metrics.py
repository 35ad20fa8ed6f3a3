import math

import evaluate
import pytest

from hf_devft.tasks.metrics import ExactMatch, Perplexity, TokenAccuracy


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
