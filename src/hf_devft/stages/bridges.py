"""Bridges: affine maps that stand for blocks of layers that a submodel leaves out (ours).

    h -> h + W rmsnorm(h) + b

The layers that stay then read nearly what they have always read, so that what is learned on them holds in the whole
model. A layer that a bridge follows has it as its submodule `bridge`, and hands on what that makes of its output.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


_EPSILON = 1e-6
BRIDGE = "bridge"


class Bridge(nn.Module):
    """The map, of hidden states of some width; at first it changes nothing."""

    def __init__(self, width: int, **factory: torch.dtype | torch.device):
        super().__init__()
        # No `nn.Linear`, on which an adapter on "all-linear" would be put.
        self.weight = nn.Parameter(torch.zeros(width, width, **factory), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(width, **factory), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = normalise(hidden_states).to(self.weight.dtype)
        return hidden_states + F.linear(normed, self.weight, self.bias).to(hidden_states.dtype)


def normalise(hidden_states: torch.Tensor) -> torch.Tensor:
    """What a bridge reads: each position's vector by its root mean square, in float32."""
    return F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=_EPSILON)


def add_bridges(model: PreTrainedModel, layers: Sequence[nn.Module], groups: Sequence[Sequence[int]]) -> None:
    """Put a bridge that changes nothing behind each layer of a submodel, in place, whose group has other layers, too.

    Args:
        layers: the submodel's, one for each of `groups`.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    for layer, group in zip(layers, groups, strict=True):
        if len(group) > 1:
            device = next(layer.parameters()).device
            layer.add_module(BRIDGE, Bridge(width, dtype=model.dtype, device=device))
            layer.register_forward_hook(_cross)


def _cross(layer: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    if isinstance(output, tuple):
        return layer.bridge(output[0]), *output[1:]
    return layer.bridge(output)


def check_contiguous(groups: Sequence[Sequence[int]]) -> None:
    """Refuse groups that no bridge can stand for.

    Raises:
        ValueError: a group's layers do not follow one another.
    """
    for group in groups:
        if list(group) != list(range(group[0], group[0] + len(group))):
            raise ValueError(
                f'fusion="bridge" bridges layers that follow one another, but layers {list(group)} share a group: set '
                'grouping="bridged".'
            )


def best_blocks(errors: torch.Tensor, capacity: int) -> list[list[int]]:
    """Cut L layers into `capacity` groups of layers that follow one another, of least error in all, where a group's
    first layer stays and the others are bridged.

    Args:
        errors: L x L; [a, e] of the bridge over layers a + 1 to e.
    """
    depth = len(errors)
    values = errors.tolist()
    # The least error of the first `end` layers in so many groups, and where the last of these begins.
    best = [[(float("inf"), 0)] * (depth + 1) for _ in range(capacity + 1)]
    best[0][0] = (0.0, 0)
    for count in range(1, capacity + 1):
        for end in range(count, depth + 1):
            best[count][end] = min(
                (best[count - 1][begin][0] + (values[begin][end - 1] if end - 1 > begin else 0.0), begin)
                for begin in range(count - 1, end)
            )
    groups, end = [], depth
    for count in range(capacity, 0, -1):
        begin = best[count][end][1]
        groups.append(list(range(begin, end)))
        end = begin
    return groups[::-1]
