"""How much an update counts that arrives late (REFL: Abdelmoniem et al. 2023, arXiv 2111.01108, §4.2)."""

import math
from collections.abc import Sequence

import torch


BETA = 0.35  # the paper's


def late_weights(
    fresh: Sequence[torch.Tensor | None], fresh_count: int, late: Sequence[torch.Tensor], staleness: Sequence[int]
) -> list[float]:
    """The weights of late updates, where a fresh one's is 1.

    w = (1 − β) / (τ + 1) + β (1 − exp(−Λ / Λ_max)), τ the rounds since, β = 0.35, and
    Λ = ‖û − (u + n û)/(n + 1)‖² / ‖û‖² how far it moves the mean û of the n fresh ones. Without any fresh one,
    1 / (τ + 1).

    Args:
        fresh: û in the values that each late update has, or None; fresh_count: n.
        late: u, flat; staleness: τ.
    """
    moved = [_moved(mean, fresh_count, update) for mean, update in zip(fresh, late, strict=True)]
    if all(mean is None for mean in fresh):
        return [1 / (age + 1) for age in staleness]
    most = max(moved) or 1.0
    return [
        (1 - BETA) / (age + 1) + BETA * (1 - math.exp(-distance / most))
        for age, distance in zip(staleness, moved, strict=True)
    ]


def _moved(mean: torch.Tensor | None, count: int, update: torch.Tensor) -> float:
    """Λ, 0 where there is no mean to be moved."""
    if mean is None or not mean.any():
        return 0.0
    return (((mean - update) / (count + 1)).square().sum() / mean.square().sum()).item()
