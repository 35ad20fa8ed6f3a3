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


def healed_state(layers: Sequence[nn.Module]) -> State:
    """Return all weights of a submodel's layers, by the layer's number and the parameter's name."""
    return {name: parameter.detach() for name, parameter in _parameters(layers).items()}


def load_healed_state(layers: Sequence[nn.Module], state: State) -> None:
    """Give a submodel's layers what `healed_state` has read; what the base shares with them stays as it is.

    Raises:
        ValueError: it is not of such layers.
    """
    before = _parameters(layers)
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (before, state)]
    if shapes[0] != shapes[1]:
        raise ValueError("the healed layers are others than the submodel's: names or shapes differ.")
    _replace(layers, {name: store_like(state[name].to(old.device), old) for name, old in before.items()})


def _parameters(layers: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Each once, as `nn.Module.named_parameters`."""
    return dict(nn.ModuleList(layers).named_parameters())


def _replace(layers: Sequence[nn.Module], parameters: dict[str, nn.Parameter]) -> None:
    """Put others in the place of all that `_parameters` has found, under every name that they have."""
    root = nn.ModuleList(layers)
    new = {id(old): parameters[name] for name, old in _parameters(layers).items()}
    for name, old in list(root.named_parameters(remove_duplicate=False)):
        module, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(module), leaf, new[id(old)])
