"""Metrics as `evaluate.Metric` subclasses that ship with the package: nothing to download.

ExactMatch().compute(predictions=["4", "blue"], references=["4", "red"])  # {"exact_match": 0.5}
"""

import evaluate
import numpy as np
from datasets import Features, Value

from hf_devft.tasks.data import IGNORED


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
