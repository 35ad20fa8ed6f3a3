"""Adapters between a submodel and the full depth: pure functions on PEFT state dicts.

Keys are PEFT's own, such as "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight". Tensors that do
not belong to the layer stack (an adapted head, `modules_to_save`) are the same at every depth and pass through.
"""

from collections.abc import Callable, Collection, Hashable, Sequence

import torch

from hf_devft.models.layer_stack import LayerNames
from hf_devft.models.layout import MAGNITUDE, RESIDUAL, B, State
from hf_devft.stages.fusion import fuse, members_read
from hf_devft.stages.grouping import Groups


def check_alike(state: State, names: LayerNames, kinds: Sequence[Hashable]) -> None:
    """Refuse an adapter that differs between layers that may share a group.

    Args:
        kinds: of the layers; only those of one kind share groups.

    Raises:
        ValueError: layers of one kind with an adapter on different modules, or of different shapes.
    """
    found: dict[int, set] = {layer: set() for layer in range(len(names))}
    for key, tensor in state.items():
        if (parts := names.split(key)) is None:
            continue
        found[parts[0]].add((parts[1], tensor.shape))
        if not any(kind in key for kind in (".lora_", ".ia3_")):
            raise ValueError(
                f"`modules_to_save` has {key}, which belongs to a single layer: only modules outside of the layers, "
                "such as a head, can be trained whole."
            )
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    if odd := [layer for layer, kind in enumerate(kinds) if found[layer] != found[first[kind]]]:
        raise ValueError(
            f"the adapter is not on all layers alike (layers {odd} differ from the first of their kind), but stages "
            "move it from layer to layer: choose `target_modules` that every layer has, or name layers by "
            "`layers_to_transform`."
        )
    if not any(found.values()):
        raise ValueError("the adapter is on none of the layers that stages group: choose other `target_modules`.")


def layers_with_adapter(state: State, names: LayerNames) -> set[int]:
    """The layers that an adapter has tensors of."""
    return {parts[0] for key in state if (parts := names.split(key)) is not None}


def kinds_by_adapter(kinds: Sequence[Hashable], adapted: Collection[int]) -> tuple[Hashable, ...]:
    """The layers' kinds, where those with an adapter are of another kind than those without."""
    return tuple((kind, layer in adapted) for layer, kind in enumerate(kinds))


def fuse_adapter(full: State, names: LayerNames, groups: Groups, fusion: str, beta: float = 0.1) -> State:
    """Make the submodel's adapter from the full-depth one: in each group, its members' adapters are fused by name.

    Members that share an adapter fuse to exactly that adapter (not under "sum").

    Args:
        names: of the full model's layers.
    """
    position = {group[0]: index for index, group in enumerate(groups)}
    short = names.keeping([group[0] for group in groups])
    fused: State = {}
    for key, tensor in full.items():
        if (parts := names.split(key)) is None:
            fused[key] = tensor
        elif parts[0] in position:
            index, rest = position[parts[0]], parts[1]
            tensors = [full[names.join(layer, rest)] for layer in members_read(groups[index], fusion)]
            fused[short.join(index, rest)] = fuse(tensors, fusion, beta)
    return fused


def keep_layers(state: State, names: LayerNames, layers: Collection[int] | None) -> State:
    """Leave out the tensors of other layers; None for all."""
    if layers is None:
        return state
    return {key: tensor for key, tensor in state.items() if (parts := names.split(key)) is None or parts[0] in layers}


def _broadcast(key: str, tensor: torch.Tensor, group: list[int]) -> dict[int, torch.Tensor]:
    """Give it to every member (§3.3: knowledge transfer)."""
    return dict.fromkeys(group, tensor)


def _anchor(key: str, tensor: torch.Tensor, group: list[int]) -> dict[int, torch.Tensor]:
    """Give it to the anchor; the others keep what they had."""
    return {group[0]: tensor}


def _split_product(key: str, tensor: torch.Tensor, group: list[int]) -> dict[int, torch.Tensor]:
    """Give it to every member, B divided by the group's size: the group's BA products add up to the representative's,
    and so do what is added to the weights as it is."""
    divided = any(part in key for part in (*B, RESIDUAL))
    return dict.fromkeys(group, tensor / len(group) if divided else tensor)


TRANSFERS: dict[str, Callable[[str, torch.Tensor, list[int]], dict[int, torch.Tensor]]] = {
    "broadcast": _broadcast,
    "anchor": _anchor,
    "split": _split_product,
}


def expand_adapter(sub: State, full: State, names: LayerNames, groups: Groups, transfer: str = "broadcast") -> State:
    """Make the full-depth adapter after a stage: `full` (what the stage started from) overwritten by the submodel's.

    DoRA's magnitudes are norms of a layer's own weights: what others receive is by which factor the anchor's changed.

    Args:
        sub: the submodel's adapter.
        full: the full-depth adapter before the stage.
        names: of the full model's layers.
        transfer: who in a group receives its representative's adapter, a name in `TRANSFERS`.
    """
    expanded = dict(full)
    short = names.keeping([group[0] for group in groups])
    for key, tensor in sub.items():
        if (parts := short.split(key)) is None:
            expanded[key] = tensor
            continue
        index, rest = parts
        anchor = full.get(names.join(groups[index][0], rest))
        for layer, received in TRANSFERS[transfer](key, tensor, groups[index]).items():
            own = names.join(layer, rest)
            if MAGNITUDE in key and anchor is not None and layer != groups[index][0]:
                received = full[own] * (received / anchor)
            expanded[own] = received
    return expanded
