"""One layer from a group of layers: differential-based layer fusion (arXiv 2508.00041, §3.3) and its ablations.

A rule works on the tensors of one parameter name: the anchor's, the other members', how many they are together,
and β. The same rules fuse base weights and adapters. A new rule is one function and one line in `FUSIONS`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch


Fusion = Callable[[torch.Tensor, Iterable[torch.Tensor], int, float], torch.Tensor]


def differential(anchor: torch.Tensor, others: Iterable[torch.Tensor], size: int, beta: float) -> torch.Tensor:
    """θ_rep = θ_a + β Σ_{j≠a} (θ_j − θ_a) (§3.3, eq. 5)."""
    differences = torch.zeros_like(anchor)
    for other in others:
        differences += other - anchor
    return differences.mul_(beta).add_(anchor)


def mean(anchor: torch.Tensor, others: Iterable[torch.Tensor], size: int, beta: float) -> torch.Tensor:
    """Ablation: the mean, written as anchor plus differences so that equal members give exactly themselves."""
    return differential(anchor, others, size, 1 / size)


def total(anchor: torch.Tensor, others: Iterable[torch.Tensor], size: int, beta: float) -> torch.Tensor:
    """Ablation: the sum."""
    return anchor + sum(others)


def anchor_only(anchor: torch.Tensor, others: Iterable[torch.Tensor], size: int, beta: float) -> torch.Tensor:
    """Ablation: the anchor as it is; the rest is dropped."""
    return anchor


FUSIONS: dict[str, Fusion] = {"differential": differential, "mean": mean, "sum": total, "anchor": anchor_only}


def fuse(members: Sequence[torch.Tensor], rule: str = "differential", beta: float = 0.1) -> torch.Tensor:
    """Fuse `members` (the first is the anchor) into one, in their shape and dtype, computed in float32 or wider.

    Members are taken one at a time, so that a sequence that reads them when asked need not hold them all. A group of
    one, and any group under "anchor", gives the anchor's own tensor back, not a copy.
    """
    anchor = members[0]
    if len(members) == 1 or rule == "anchor":
        return anchor
    wide = torch.promote_types(anchor.dtype, torch.float32)
    others = (members[index].to(wide) for index in range(1, len(members)))
    return FUSIONS[rule](anchor.to(wide), others, len(members), beta).to(anchor.dtype)
