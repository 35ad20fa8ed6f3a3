"""How far two versions of a base are apart, before an adapter of the one is put on the other."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.weights import dense, shape_of


@dataclass(frozen=True)
class BaseDifference:
    """‖new − old‖ / ‖old‖ (Frobenius), 0 for equal weights.

    Attributes:
        overall: over all parameters.
        layers: of each layer; shared: of everything outside of the layers.
    """

    overall: float
    layers: tuple[float, ...]
    shared: float

    def __str__(self) -> str:
        most = max(range(len(self.layers)), key=self.layers.__getitem__)
        return (
            f"{self.overall:.2%} of the weights' norm overall, {min(self.layers):.2%} to {self.layers[most]:.2%} of a "
            f"layer's (layer {most}), {self.shared:.2%} outside of the layers"
        )


@torch.no_grad()
def base_difference(old: PreTrainedModel, new: PreTrainedModel) -> BaseDifference:
    """Compare two bases, one parameter at a time, however each is stored; bases that are still in their checkpoints
    need no memory.

    Raises:
        ValueError: their parameters differ in name or shape, so that no adapter fits both.
    """
    pairs = [dict(model.named_parameters()) for model in (old, new)]
    shapes = [{name: tuple(shape_of(parameter)) for name, parameter in parameters.items()} for parameters in pairs]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"the bases differ in {len(odd)} parameters, such as {odd[0]}: {shapes[0].get(odd[0])} in the old one, "
            f"{shapes[1].get(odd[0])} in the new one. An adapter fits bases of one shape only."
        )
    stack = find_layer_stack(old)
    squares: dict[int | None, torch.Tensor] = {}
    for name in shapes[0]:
        key = (stack.names.split(name) or (None,))[0]
        squares[key] = squares.get(key, torch.zeros(2, dtype=torch.float64)) + _squares(pairs[0][name], pairs[1][name])
    layers = tuple(_ratio([squares[index]]) for index in range(len(stack)))
    shared = [squares[None]] if None in squares else []
    return BaseDifference(_ratio(squares.values()), layers, _ratio(shared))


def _squares(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """‖new − old‖² and ‖old‖²."""
    values, others = dense(old).float().cpu(), dense(new).float().cpu()
    return torch.stack([(others - values).square().sum(), values.square().sum()]).double()


def _ratio(squares: Iterable[torch.Tensor]) -> float:
    total = sum(squares, torch.zeros(2, dtype=torch.float64))
    return (total[0] / total[1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().item()
