"""Metrics as `evaluate.Metric` subclasses that ship with the package: nothing to download.

ExactMatch().compute(predictions=["4", "blue"], references=["4", "red"])  # {"exact_match": 0.5}
"""

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction


IGNORED = -100

_CITATION = "https://arxiv.org/abs/2508.00041"


class TokenAccuracy(evaluate.Metric):
    """Share of the tokens predicted right, given all tokens before them. References of -100 do not count."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        counted = references != IGNORED
        return {"token_accuracy": float((predictions == references)[counted].mean()) if counted.any() else 0.0}


class ExactMatch(evaluate.Metric):
    """Share of the answers that equal their reference, apart from white space at either end."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions, references):
        equal = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": float(np.mean(equal)) if equal else 0.0}


class Perplexity(evaluate.Metric):
    """exp of the mean negative log-likelihood per token: `predictions` in nats, `references` tokens (-100 ignored)."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            features=Features({"predictions": Value("float64"), "references": Value("int64")}),
        )

    def _compute(self, predictions, references):
        counted = np.asarray(references) != IGNORED
        return {
            "perplexity": float(np.exp(np.asarray(predictions)[counted].mean())) if counted.any() else float("inf")
        }


def reduce_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For `preprocess_logits_for_metrics`: two numbers per token instead of the whole vocabulary.

    Args:
        logits: or these two numbers, of a model that has computed no more (see `models/counted_logits.py`).

    Returns:
        The token predicted and its label's negative log-likelihood, each batch x (length - 1).
    """
    if isinstance(logits, tuple) and logits[0].dim() == 2:
        return logits
    logits, labels = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1], labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none"
    )
    return logits.argmax(-1), nll


class LanguageModelMetrics:
    """For `compute_metrics`, with `reduce_logits`: token accuracy and perplexity."""

    def __init__(self):
        self.token_accuracy, self.perplexity = TokenAccuracy(), Perplexity()

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        tokens, nll = (array.ravel() for array in output.predictions)
        labels = output.label_ids[:, 1:].ravel()
        return self.token_accuracy.compute(predictions=tokens, references=labels) | self.perplexity.compute(
            predictions=nll, references=labels
        )


def argmax_logits(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """For `preprocess_logits_for_metrics`: the class (or token) predicted."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class ClassificationMetrics:
    """For `compute_metrics`, with `argmax_logits`: accuracy, and F1 as the mean over the classes. Labels of -100 do
    not count.

    Args:
        f1: whether it is wanted; not of tokens, of which there are too many kinds.
    """

    def __init__(self, f1: bool = True):
        self.f1 = f1

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        predictions, labels = np.ravel(output.predictions), np.ravel(output.label_ids)
        predictions, labels = predictions[labels != IGNORED], labels[labels != IGNORED]
        metrics = {"accuracy": float(accuracy_score(labels, predictions))}
        if self.f1:
            metrics["f1"] = float(f1_score(labels, predictions, average="macro", zero_division=0.0))
        return metrics
