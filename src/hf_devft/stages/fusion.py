"""One layer from a group of layers: differential-based layer fusion (arXiv 2508.00041, §3.3) and its ablations.

A rule works on the tensors of one parameter name: the anchor's, the other members', and β. The same rules
fuse base weights and adapters. A new rule is one function and one line in `FUSIONS`.
"""

from collections.abc import Callable, Sequence

import torch


Fusion = Callable[[torch.Tensor, Sequence[torch.Tensor], float], torch.Tensor]


def differential(anchor: torch.Tensor, others: Sequence[torch.Tensor], beta: float) -> torch.Tensor:
    """θ_rep = θ_a + β Σ_{j≠a} (θ_j − θ_a) (§3.3, eq. 5)."""
    return anchor + beta * sum(other - anchor for other in others)


def mean(anchor: torch.Tensor, others: Sequence[torch.Tensor], beta: float) -> torch.Tensor:
    """Ablation: the mean, written as anchor plus differences so that equal members give exactly themselves."""
    return differential(anchor, others, 1 / (len(others) + 1))


def total(anchor: torch.Tensor, others: Sequence[torch.Tensor], beta: float) -> torch.Tensor:
    """Ablation: the sum."""
    return anchor + sum(others)


def anchor_only(anchor: torch.Tensor, others: Sequence[torch.Tensor], beta: float) -> torch.Tensor:
    """Ablation: the anchor as it is; the rest is dropped."""
    return anchor


FUSIONS: dict[str, Fusion] = {"differential": differential, "mean": mean, "sum": total, "anchor": anchor_only}


def fuse(members: Sequence[torch.Tensor], rule: str = "differential", beta: float = 0.1) -> torch.Tensor:
    """The representative of `members` (the first is the anchor): their shape and dtype, computed in float32 or wider.

    A group of one, and any group under "anchor", gives the anchor's own tensor back, not a copy.
    """
    anchor, *others = members
    if not others or rule == "anchor":
        return anchor
    wide = torch.promote_types(anchor.dtype, torch.float32)
    return FUSIONS[rule](anchor.to(wide), [other.to(wide) for other in others], beta).to(anchor.dtype)
