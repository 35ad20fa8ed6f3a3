"""Healing: a submodel's layers are taught to stand for all of the base's, before anything is learned on them.

The word is that of the literature on pruned models (Gromov et al. 2024, arXiv 2403.17887).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_devft.models.layout import State
from hf_devft.models.weights import store_like
from hf_devft.stages.bridges import BRIDGE
from hf_devft.stages.teaching.distillation import distil


def heal(
    teacher: PreTrainedModel,
    submodel: PreTrainedModel,
    layers: Sequence[nn.Module],
    batches: Iterable[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    autocast: Callable[[], AbstractContextManager],
) -> int:
    """Train all weights of `layers` until `submodel` says of texts what `teacher` does, without any labels.

    Layers that were cut out of a model, or fused, have never seen each other's outputs; a short distillation gives
    back most of what that costs (Muralidharan et al. 2024, arXiv 2407.14679; of frozen middles in Offsite-Tuning, Xiao
    et al. 2023, arXiv 2302.04870). Everything else is the base's own, shared, and stays as it is. Trained in float32,
    kept as the layers were; see `distil`.

    Args:
        teacher: the whole base, without adapter.
        submodel: whose stack is `layers`; their parameters become new ones.

    Returns:
        The positions that went through each of the two.
    """
    submodel.requires_grad_(False)
    before = _parameters(layers)
    _replace(layers, {name: nn.Parameter(old.detach().float().clone()) for name, old in before.items()})
    try:
        return distil(teacher, submodel, batches, steps, learning_rate, autocast)
    finally:
        trained = _parameters(layers)
        _replace(layers, {name: store_like(trained[name].detach(), old) for name, old in before.items()})


def taught_state(layers: Sequence[nn.Module], bridges_only: bool = False) -> State:
    """Return the weights of a submodel's layers, by the layer's number and the parameter's name: all, or those of its
    bridges."""
    return {name: parameter.detach() for name, parameter in _taught(layers, bridges_only).items()}


def load_taught_state(layers: Sequence[nn.Module], state: State, bridges_only: bool = False) -> None:
    """Give a submodel's layers what `taught_state` has read; what the base shares with them stays as it is.

    Raises:
        ValueError: it is not of such layers.
    """
    before = _taught(layers, bridges_only)
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (before, state)]
    if shapes[0] != shapes[1]:
        raise ValueError("the healed layers are others than the submodel's: names or shapes differ.")
    _replace(layers, {name: store_like(state[name].to(old.device), old) for name, old in before.items()})


def _parameters(layers: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Each once, as `nn.Module.named_parameters`."""
    return dict(nn.ModuleList(layers).named_parameters())


def _taught(layers: Sequence[nn.Module], bridges_only: bool) -> dict[str, nn.Parameter]:
    """What the server has made of them."""
    found = _parameters(layers)
    return {name: own for name, own in found.items() if f".{BRIDGE}." in name} if bridges_only else found


def _replace(layers: Sequence[nn.Module], parameters: dict[str, nn.Parameter]) -> None:
    """Put others in the place of some of what `_parameters` has found, under every name that they have."""
    root = nn.ModuleList(layers)
    new = {id(old): parameters[name] for name, old in _parameters(layers).items() if name in parameters}
    for name, old in list(root.named_parameters(remove_duplicate=False)):
        if id(old) in new:
            module, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(module), leaf, new[id(old)])
