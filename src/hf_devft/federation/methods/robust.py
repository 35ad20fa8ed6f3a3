"""Robust aggregation rules: one update that stands for a round's, however wrong a few of them are.

To add one of your own: a subclass of `AggregationRule` and `AGGREGATION_RULES["mine"] = MyRule`.
"""

from abc import ABC, abstractmethod

import torch


class AggregationRule(ABC):
    """Takes the place of the mean over a round's clients, whose updates the server keeps until all are there: its
    memory grows by one adapter for each client of a round.

    Attributes:
        needs: the fewest updates that it can do its work with; `round_quorum` must be as many.
    """

    needs = 3  # of two that differ, nobody can say which one is wrong

    @abstractmethod
    def combine(self, updates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return one update for all, of `values`.

        Args:
            updates: clients x values, float64. weights: of the clients, their examples, but none
                above the round's median.
        """


class Median(AggregationRule):
    """The median of each value (Yin et al. 2018, arXiv 1803.01498, Definition 1), all clients alike."""

    def combine(self, updates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ordered, count = updates.sort(dim=0).values, len(updates)
        return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


class TrimmedMean(AggregationRule):
    """The mean of each value without its largest and smallest ones (Yin et al. 2018, Definition 2), all clients alike.

    Args:
        trimmed_fraction: β, the part of the clients left out at either end, default 0.2 (our choice); at least one.

    Raises:
        ValueError: outside of 0 to below 0.5.
    """

    def __init__(self, trimmed_fraction: float = 0.2):
        if not 0 < trimmed_fraction < 0.5:
            raise ValueError(f"trimmed_fraction={trimmed_fraction}: give a part above 0, below 0.5.")
        self.trimmed_fraction = trimmed_fraction

    def combine(self, updates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        count = len(updates)
        cut = min(max(1, round(self.trimmed_fraction * count)), (count - 1) // 2)
        return updates.sort(dim=0).values[cut : count - cut].mean(dim=0)


class GeometricMedian(AggregationRule):
    """The point with the smallest sum of distances to the updates, weighted by examples: RFA (Pillutla et al. 2022,
    arXiv 1912.13445, Algorithm 2), by smoothed Weiszfeld steps.

    Args:
        weiszfeld_steps: default 100, at most; the paper's 4 are for clients that take part in each step.

    Raises:
        ValueError: fewer than 1.
    """

    def __init__(self, weiszfeld_steps: int = 100):
        if weiszfeld_steps < 1:
            raise ValueError(f"weiszfeld_steps={weiszfeld_steps}: give 1 or more.")
        self.weiszfeld_steps = weiszfeld_steps

    def combine(self, updates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # From the median, not from the mean as in the paper: a mean may be 1e6 times too far away to come back from.
        point = Median().combine(updates, weights)
        for _ in range(self.weiszfeld_steps):
            nearness = weights / (updates - point).norm(dim=1).clamp_min(1e-6)  # the paper's ν
            closer = nearness @ updates / nearness.sum()
            moved, point = (closer - point).norm(), closer
            if moved <= 1e-9 * point.norm():
                break
        return point


class Krum(AggregationRule):
    """The update with the smallest sum of squared distances to the n − f − 2 nearest others (Blanchard et al. 2017,
    NeurIPS, §4).

    Args:
        byzantine: f, how many of a round's clients may be bad, default 1.

    Raises:
        ValueError: below 0.
    """

    def __init__(self, byzantine: int = 1):
        if byzantine < 0:
            raise ValueError(f"byzantine={byzantine}: give 0 or more.")
        self.byzantine = byzantine
        self.needs = 2 * byzantine + 3  # Proposition 1

    def combine(self, updates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return updates[self.scores(updates).argmin()]

    def scores(self, updates: torch.Tensor) -> torch.Tensor:
        """Return the sum of squared distances of each update to its nearest others."""
        # Not by a matrix product, which loses small distances beside large norms.
        squares = torch.cdist(updates, updates, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = squares.sort(dim=1).values[:, 1 : len(updates) - self.byzantine - 1]  # the first is itself
        return nearest.sum(dim=1)


class MultiKrum(Krum):
    """The mean of the n − f updates with the best scores of `Krum` (Blanchard et al. 2017, §5), all alike."""

    def combine(self, updates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        best = self.scores(updates).topk(len(updates) - self.byzantine, largest=False).indices
        return updates[best].mean(dim=0)


class NormClipping(AggregationRule):
    """The mean, weighted by examples, of updates scaled down to a norm (Sun et al. 2019, arXiv 1911.07963, §4).

    Args:
        max_update_norm: the norm; default: the median of the round's (our choice: nothing must be known of them).

    Raises:
        ValueError: 0 or less.
    """

    needs = 1

    def __init__(self, max_update_norm: float | None = None):
        if max_update_norm is not None and max_update_norm <= 0:
            raise ValueError(f"max_update_norm={max_update_norm}: give a norm above 0.")
        self.max_update_norm = max_update_norm
        if max_update_norm is None:
            self.needs = AggregationRule.needs

    def combine(self, updates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        norms = updates.norm(dim=1)
        bound = norms.median() if self.max_update_norm is None else self.max_update_norm
        clipped = updates * (bound / norms).nan_to_num(1.0).clamp_max(1)[:, None]
        return weights @ clipped / weights.sum()


AGGREGATION_RULES: dict[str, type[AggregationRule]] = {
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "norm_clipping": NormClipping,
}
