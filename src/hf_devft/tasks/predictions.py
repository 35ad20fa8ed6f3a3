"""What an evaluation makes of a model's predictions: the few numbers that are kept of logits, and what is measured."""

import numpy as np
import torch
from transformers import EvalPrediction

from hf_devft.tasks.data import IGNORED


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


def language_model_metrics(output: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`, with `reduce_logits`: token accuracy and perplexity."""
    from hf_devft.tasks.metrics import Perplexity, TokenAccuracy  # here, as `evaluate` takes long to import

    tokens, nll = (array.ravel() for array in output.predictions)
    labels = output.label_ids[:, 1:].ravel()
    measured = TokenAccuracy().compute(predictions=tokens, references=labels)
    return measured | Perplexity().compute(predictions=nll, references=labels)


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
        from sklearn.metrics import accuracy_score, f1_score  # here, as it takes long to import

        predictions, labels = np.ravel(output.predictions), np.ravel(output.label_ids)
        predictions, labels = predictions[labels != IGNORED], labels[labels != IGNORED]
        metrics = {"accuracy": float(accuracy_score(labels, predictions))}
        if self.f1:
            metrics["f1"] = float(f1_score(labels, predictions, average="macro", zero_division=0.0))
        return metrics
