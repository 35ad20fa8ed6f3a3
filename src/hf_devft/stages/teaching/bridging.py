"""Bridges are found by ridge regression of what a block of layers does, on the server's own texts, without labels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_devft.stages.bridges import Bridge, normalise


# Of the mean diagonal of the regression's Gram matrix (our choice: a tenth or ten times of it makes no difference).
_RIDGE = 1e-3
# Directions in which the errors of all blocks are estimated, so that memory grows with the width, not its square.
_SKETCH = 128

Batches = Iterable[dict[str, torch.Tensor]]
Autocast = Callable[[], AbstractContextManager]


@torch.no_grad()
def bridge_errors(
    teacher: PreTrainedModel, layers: Sequence[nn.Module], batches: Batches, autocast: Autocast
) -> torch.Tensor:
    """Estimate how well a bridge would stand for each block of layers that follow one another, in one pass: L x L;
    [a, e] is the relative squared error of what comes out of layer e, with a bridge over layers a + 1 to e.

    Args:
        teacher: the whole base; layers: its.
    """
    depth, width = len(layers), teacher.config.get_text_config(decoder=True).hidden_size
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(width, min(width, _SKETCH), generator=generator) / min(width, _SKETCH) ** 0.5
    sums: list[_Sums] = [_Sums(width) for _ in range(depth)]
    sizes = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
    for states in _hidden_states(teacher, layers, batches, autocast):
        sketched = [state @ sketch.to(state) for state in states]
        for start in range(1, depth):
            weights = _weights(states[start])
            changes = torch.cat([state - sketched[start] for state in sketched[start + 1 :]], dim=-1)
            sums[start].add(states[start], changes, weights)
            for end in range(start + 1, depth + 1):
                sizes[start, end] += (weights * sketched[end].square().sum(-1)).sum().cpu()
    errors = torch.zeros(depth, depth, dtype=torch.float64)
    for start in range(1, depth):
        residuals = sums[start].residuals().unflatten(0, (-1, sketch.shape[1])).sum(-1)
        errors[start - 1, start:] = residuals / sizes[start, start + 1 :]
    return errors


@torch.no_grad()
def fit_bridges(
    teacher: PreTrainedModel,
    layers: Sequence[nn.Module],
    bridges: dict[tuple[int, int], Bridge],
    batches: Batches,
    autocast: Autocast,
) -> None:
    """Fit bridges, in place, to what their layers do to the hidden states of the whole base.

    Args:
        teacher: the whole base; layers: its.
        bridges: (a, e) -> the bridge over layers a + 1 to e.
    """
    width = teacher.config.get_text_config(decoder=True).hidden_size
    sums = {block: _Sums(width) for block in bridges}
    for states in _hidden_states(teacher, layers, batches, autocast):
        for (before, last), own in sums.items():
            start, end = states[before + 1], states[last + 1]
            own.add(start, end - start, _weights(start))
    for block, bridge in bridges.items():
        solution = sums[block].solve().to(bridge.weight)
        bridge.weight.copy_(solution[:-1].T)
        bridge.bias.copy_(solution[-1])


def bridge_errors_flops(teacher: PreTrainedModel, depth: int, positions: int) -> float:
    """Count the FLOPs of `bridge_errors` beside the forward pass: of the regressions' sums."""
    width = teacher.config.get_text_config(decoder=True).hidden_size
    blocks, sketch = depth * (depth - 1) / 2, min(width, _SKETCH)
    return positions * 2.0 * width * ((depth - 1) * width + (depth + 1 + blocks) * sketch)


def fit_flops(teacher: PreTrainedModel, bridges: int, positions: int) -> float:
    """Count those of `fit_bridges` likewise."""
    width = teacher.config.get_text_config(decoder=True).hidden_size
    return positions * bridges * 4.0 * width * width


class _Sums:
    """The sums of a weighted regression of changes on normalised states and a constant, over all positions."""

    def __init__(self, width: int):
        self.inputs = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.products: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None

    def add(self, states: torch.Tensor, changes: torch.Tensor, weights: torch.Tensor) -> None:
        """Add positions: their states and changes, a row each."""
        root = weights.sqrt()[:, None]
        inputs = torch.cat([normalise(states), torch.ones_like(root)], dim=-1) * root
        changes = changes * root
        products, squares = (inputs.T @ changes).cpu().double(), changes.square().sum(0).cpu().double()
        self.inputs += (inputs.T @ inputs).cpu().double()
        self.products = products if self.products is None else self.products + products
        self.squares = squares if self.squares is None else self.squares + squares

    def solve(self) -> torch.Tensor:
        """The coefficients: (width + 1) x outputs, the constant's last."""
        assert self.products is not None
        ridge = _RIDGE * self.inputs.diagonal()[:-1].mean() * torch.eye(len(self.inputs), dtype=torch.float64)
        ridge[-1, -1] = 0  # the constant is free
        return torch.linalg.solve(self.inputs + ridge, self.products)

    def residuals(self) -> torch.Tensor:
        """The sum of squares that is left of each output."""
        assert self.products is not None
        assert self.squares is not None
        solution = self.solve()
        explained = (2 * solution * self.products).sum(0) - (solution * (self.inputs @ solution)).sum(0)
        return (self.squares - explained).clamp_min(0)


def _weights(states: torch.Tensor) -> torch.Tensor:
    """One by the square of a position's norm: layers read what is normalised, so relative errors count, and the first
    token's state, which is a hundred times as large in many models, must not be all that counts."""
    return 1 / states.square().sum(-1).clamp_min(torch.finfo(states.dtype).tiny)


def _hidden_states(
    teacher: PreTrainedModel, layers: Sequence[nn.Module], batches: Batches, autocast: Autocast
) -> Iterator[list[torch.Tensor]]:
    """For each batch, what goes into each layer and what comes out of the last: L + 1 tensors of (positions, width),
    in float32, padding left out."""
    teacher.eval()
    for inputs in batches:
        with _recorded(layers) as states, autocast():
            teacher(**inputs)
        mask, shape = inputs.get("attention_mask"), states[0].shape[:-1]
        is_of_positions = mask is not None and mask.shape == shape  # of sound it is of samples
        chosen = mask.bool() if is_of_positions else torch.ones(shape, dtype=torch.bool)
        yield [state[chosen.to(state.device)].float() for state in states]


@contextmanager
def _recorded(layers: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Within this context, what a forward pass sends into the layers, and out of the last, is added to a list."""
    states: list[torch.Tensor] = []

    def before(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(layer: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
