"""Groups and a fusion rule -> a model of as many layers as there are groups."""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from hf_devft.models.layer_stack import LayerStack, find_layer_stack, with_layers
from hf_devft.models.weights import DenseValues, check_dense, is_stored, store_like
from hf_devft.stages.bridges import add_bridges, check_contiguous
from hf_devft.stages.fusion import fuse, members_read
from hf_devft.stages.grouping import Groups


def build_submodel(
    model: PreTrainedModel, stack: LayerStack, groups: Groups, fusion: str, beta: float = 0.1
) -> PreTrainedModel:
    """Make a stage's model: one representative layer per group; everything else is `model`'s own, shared.

    Args:
        model: the full base, without adapters.
        groups: see `grouping`.
        fusion: a name in `FUSIONS`.
        beta: weight of the differences in differential fusion (paper: 0.1).

    Returns:
        A new model; `model` stays as it is. Only fused tensors are new memory, bridges, and layers that are still in
        the checkpoint; 4-bit parameters are dequantised, fused and quantised again. Bridges change nothing as yet.

    Raises:
        ValueError: groups that cannot be bridged, or weights that cannot be fused.
    """
    submodel = with_layers(model, stack, [group[0] for group in groups])
    for layer, group in zip(layers_of(submodel, stack, groups), groups, strict=True):
        members = [stack.layers[index] for index in members_read(group, fusion)]
        if len(members) > 1 or any(map(is_stored, layer.parameters())):
            _fuse_into(layer, members, fusion, beta)
    if fusion == "bridge":
        check_contiguous(groups)
        add_bridges(submodel, layers_of(submodel, stack, groups), groups)
    return submodel


def reloads_alike(submodel: PreTrainedModel) -> bool:
    """Whether transformers makes the same modules of a submodel's config: architectures that compute something of a
    layer's number, or of how many layers there are, have that of the base in its layers. Quantised ones are not looked
    at."""
    if getattr(submodel.config, "quantization_config", None) is not None:
        return True
    with init_empty_weights():
        fresh = type(submodel)(copy.deepcopy(submodel.config))
    return {name: _made_of(module) for name, module in submodel.named_modules()} == {
        name: _made_of(module) for name, module in fresh.named_modules()
    }


def _made_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's numbers, but for its place, and its parameters' shapes."""
    places = ("training", "layer_idx", "layer_id", "gradient_checkpointing")
    numbers = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float)) and name not in places and not name.startswith("_")
    }
    return numbers, {name: weight.shape for name, weight in module.named_parameters(recurse=False)}


def layers_of(submodel: PreTrainedModel, stack: LayerStack, groups: Groups) -> list[nn.Module]:
    """Return the layers of a submodel of `stack`."""
    return stack.names.keeping([group[0] for group in groups]).layers(submodel)


def build_whole(model: PreTrainedModel, which: str | None = None) -> PreTrainedModel:
    """Make the submodel of all layers: `model` again, with what is still in the checkpoint read.

    Args:
        which: see `find_layer_stack`.
    """
    stack = find_layer_stack(model, which)
    return build_submodel(model, stack, [[layer] for layer in range(len(stack))], fusion="anchor")


@torch.no_grad()
def _fuse_into(layer: nn.Module, members: list[nn.Module], fusion: str, beta: float) -> None:
    """Give `layer` (a copy of the anchor) the fused parameters of `members`, one parameter at a time."""
    check_dense(layer)
    for name, anchor in list(layer.named_parameters()):
        values = fuse(DenseValues([member.get_parameter(name) for member in members]), fusion, beta)
        parent, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(parent), leaf, store_like(values, anchor))
