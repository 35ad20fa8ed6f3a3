"""One layer from a group of layers: differential-based layer fusion (arXiv 2508.00041, §3.3) and its ablations.

A rule works on the tensors of one parameter name. The same rules fuse base weights and adapters, so members that are
all equal should fuse to just that (only the sum does not). A new rule is one function and one line in `FUSIONS`.
"bridge" is the anchor, too: `bridges.py` has what stands for the others.
"""

from collections.abc import Callable, Iterable, Sequence

import torch


# (anchor: the tensor of the group's first layer; others: those of the other members, each read when it is asked for;
# size: how many members there are, the anchor included; beta: β) -> the representative's tensor.
Fusion = Callable[[torch.Tensor, Iterable[torch.Tensor], int, float], torch.Tensor]


def differential(anchor: torch.Tensor, others: Iterable[torch.Tensor], size: int, beta: float) -> torch.Tensor:
    """θ_rep = θ_a + β Σ_{j≠a} (θ_j − θ_a) (§3.3, eq. 5)."""
    differences = torch.zeros_like(anchor)
    for other in others:
        differences += other - anchor
    return differences.mul_(beta).add_(anchor)


def mean(anchor: torch.Tensor, others: Iterable[torch.Tensor], size: int, beta: float) -> torch.Tensor:
    """Ablation: the mean; as `differential` with β = 1 / size, so that equal members give exactly themselves."""
    return differential(anchor, others, size, 1 / size)


def total(anchor: torch.Tensor, others: Iterable[torch.Tensor], size: int, beta: float) -> torch.Tensor:
    """Ablation: the sum."""
    return anchor + sum(others)


def anchor_only(anchor: torch.Tensor, others: Iterable[torch.Tensor], size: int, beta: float) -> torch.Tensor:
    """Ablation: the anchor as it is; the rest is dropped."""
    return anchor


FUSIONS: dict[str, Fusion] = {
    "differential": differential,
    "mean": mean,
    "sum": total,
    "anchor": anchor_only,
    "bridge": anchor_only,
}


def members_read(group: Sequence[int], rule: str) -> Sequence[int]:
    """Return the members of a group that a rule asks for: the anchor alone where that stays, so that the others may be
    of another kind, or have no adapter."""
    return group[:1] if FUSIONS[rule] is anchor_only else group


def fuse(members: Sequence[torch.Tensor], rule: str, beta: float = 0.1) -> torch.Tensor:
    """Fuse `members` (the first is the anchor) into one, in their shape and dtype, computed in float32 or wider.

    `members` may be a sequence that reads a member when it is asked for it: none is asked for that the rule does not
    use. A group of one, and any group of which the anchor stays, gives the anchor's own tensor back, not a copy.

    Args:
        rule: a name in `FUSIONS`. beta: β of differential fusion (paper: 0.1).
    """
    anchor = members[0]
    if len(members) == 1 or FUSIONS[rule] is anchor_only:
        return anchor
    wide = torch.promote_types(anchor.dtype, torch.float32)
    others = (members[index].to(wide) for index in range(1, len(members)))
    return FUSIONS[rule](anchor.to(wide), others, len(members), beta).to(anchor.dtype)
