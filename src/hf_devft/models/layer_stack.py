"""Find a model's stack of layers, and put in a shorter one."""

import copy
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from hf_devft.models.weights import shape_of


# The stacks of an encoder-decoder model.
STACKS = ("encoder", "decoder")
# A config's lists of what each layer is; layers that differ in one share no group.
_TYPES = ("layer_types", "attention_layers", "no_rope_layers")


@dataclass(frozen=True)
class LayerNames:
    """How the layers of a stack are named: in one module list, or in an encoder's and a decoder's, counted through.

    Attributes:
        lists: {dotted name of a module list, such as "model.layers": its number of layers}, in order.
    """

    lists: dict[str, int]

    def __len__(self) -> int:
        return sum(self.lists.values())

    def split(self, key: str) -> tuple[int, tuple[str, str]] | None:
        """(number of the layer that a tensor belongs to, its name without that), or None outside of the stack."""
        first = 0
        for path, count in self.lists.items():
            if match := re.fullmatch(rf"((?:.*\.)?){re.escape(path)}\.(\d+)(\..*)", key):
                return first + int(match[2]), (match[1], match[3])
            first += count
        return None

    def join(self, layer: int, rest: tuple[str, str]) -> str:
        """The name that `split` takes apart."""
        for path, count in self.lists.items():
            if layer < count:
                return f"{rest[0]}{path}.{layer}{rest[1]}"
            layer -= count
        raise IndexError(f"there is no layer {layer} in {self.lists}")

    def keeping(self, kept: Sequence[int]) -> "LayerNames":
        """With only the layers `kept`, renumbered in each list."""
        ends = list(accumulate(self.lists.values()))
        spans = zip([0, *ends], ends, strict=False)
        counts = [sum(start <= layer < end for layer in kept) for start, end in spans]
        return LayerNames(dict(zip(self.lists, counts, strict=True)))

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of a model whose lists have these names."""
        return [layer for path in self.lists for layer in model.get_submodule(path)]


@dataclass(frozen=True)
class LayerStack:
    """A model's stack of L layers.

    Attributes:
        names: where they are.
        layers: the L layers, in order.
        kinds: one value per layer; only layers of equal kind have the same parameters and the same type.
    """

    names: LayerNames
    layers: list[nn.Module]
    kinds: tuple[Hashable, ...]

    def __len__(self) -> int:
        return len(self.layers)


def find_layer_stack(model: PreTrainedModel, which: str | None = None) -> LayerStack:
    """Find the one `nn.ModuleList` that has as many members as the model's config has hidden layers, or that of the
    encoder and that of the decoder, one after the other.

    Found by structure, so that no model needs an entry in a list of names.

    Args:
        which: "encoder" or "decoder", for that stack alone.

    Raises:
        ValueError: no such list, or more than one.
    """
    sections = _sections(model.config)
    if which is not None and which not in sections:
        raise ValueError(f'{type(model).__name__} has no encoder and decoder: leave out stack="{which}".')
    found = {
        part: _find_list(model, part, getattr(config, name))
        for part, (config, name) in sections.items()
        if which in (None, part)
    }
    layers: list[nn.Module] = []
    kinds: list[Hashable] = []
    for part, (path, members) in found.items():
        types = zip(*_types_of(sections[part][0], len(members)).values(), strict=True)
        layers += members
        kinds += [(path, *_kind(layer, next(types, ()))) for layer in members]
    return LayerStack(LayerNames({path: len(members) for path, members in found.values()}), layers, tuple(kinds))


def encoders_of(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that positions of their own go through, beside those of the last stack of layers."""
    *first, _ = find_layer_stack(model).names.lists
    return [model.get_submodule(path.rpartition(".")[0]) for path in first]


def watch_lengths(model: PreTrainedModel, names: LayerNames | None = None) -> tuple[list[int], list[RemovableHandle]]:
    """Watch the lengths of the sequences that go through each stack of a model's layers; returns a list that is kept
    up to date, and the hooks to remove in the end.

    Args:
        names: of its layers, found by default.
    """
    stacks = [model.get_submodule(path) for path in (names or find_layer_stack(model).names).lists]
    lengths = [0] * len(stacks)

    def watch(stack: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        lengths[stack] = (args[0] if args else kwargs["hidden_states"]).shape[1]

    # On all layers, as some are left out at random.
    return lengths, [
        layer.register_forward_pre_hook(partial(watch, index), with_kwargs=True)
        for index, layers in enumerate(stacks)
        for layer in layers
    ]


def _sections(config: PretrainedConfig) -> dict[str, tuple[PretrainedConfig, str]]:
    """{part of the model: (its config, name of its depth there)}; the part of a model of one stack is ""."""
    if not config.is_encoder_decoder:
        return {"": (config.get_text_config(decoder=True), "num_hidden_layers")}
    found = {}
    for part in STACKS:
        own = getattr(config, part, None)
        if isinstance(own, PretrainedConfig):
            found[part] = (own.get_text_config(decoder=True), "num_hidden_layers")
        else:
            names = (f"{part}_layers", f"num_{part}_layers", "num_hidden_layers")
            found[part] = (config, next(name for name in names if hasattr(config, name)))
    return found


def _part(path: str) -> str:
    """Whose a module is, of an encoder-decoder model."""
    return next((name for name in path.split(".") if name in STACKS), "")


def _find_list(model: PreTrainedModel, part: str, depth: int) -> tuple[str, nn.ModuleList]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name, module in lists.items() if len(module) == depth and part in ("", _part(name))]
    # A list inside a layer (the experts of a mixture, say) is part of that layer.
    found = [name for name in found if not any(name.startswith(f"{outer}.") for outer in lists if outer != name)]
    # One of convolutions, as before an audio encoder's layers, is no stack.
    found = [name for name in found if any(len(shape_of(weight)) == 2 for weight in lists[name].parameters())]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} module lists of num_hidden_layers={depth} members "
            f"({', '.join(found) or 'none'}; all lists: { {name: len(module) for name, module in lists.items()} }): "
            "stages need one stack of layers, or an encoder's and a decoder's. A model whose layers share their "
            "weights or stand in blocks of different sizes has none."
        )
    return found[0], lists[found[0]]


def _kind(layer: nn.Module, layer_type: tuple) -> tuple:
    """The same with an adapter and without."""
    parameters = [(name, weight) for name, weight in layer.named_parameters() if not re.search(r"\.(lora|ia3)_", name)]
    shapes = tuple((name.replace(".base_layer", ""), tuple(shape_of(weight))) for name, weight in parameters)
    return type(layer).__name__, layer_type, shapes


@torch.no_grad()
def returns_tuple(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Pass one token through the model to see whether its layers return a tuple, as some architectures' do."""
    seen = []
    handle = layers[0].register_forward_hook(lambda layer, inputs, output: seen.append(isinstance(output, tuple)))
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def without_layers(layers: Sequence[nn.Module], skipped: Sequence[int], in_tuple: bool = False) -> Iterator[None]:
    """Within this context, the layers `skipped` hand on what they are given; `in_tuple`, see `returns_tuple`."""
    for index in skipped:
        layers[index].forward = _pass_on_in_tuple if in_tuple else _pass_on
    try:
        yield
    finally:
        for index in skipped:
            del layers[index].forward


def _pass_on(hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return hidden_states


def _pass_on_in_tuple(hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor]:
    return (hidden_states,)


def with_layers(model: PreTrainedModel, stack: LayerStack, kept: Sequence[int]) -> PreTrainedModel:
    """Make a second model that shares every tensor with `model` but has only the layers `kept`, renumbered from 0.

    Modules are new, parameters and buffers are the same objects, so nothing is copied but Python structure.
    The config is a copy with the shorter depth; its per-layer lists (`layer_types`, ...) are shortened alike,
    so generation, the KV cache and attention masks see a model of `len(kept)` layers.
    """
    memo = shared_parts(model)
    config = copy.deepcopy(model.config, memo)
    sections, names = _sections(config), stack.names.keeping(kept)
    first, kept_of = 0, {}
    for path, depth in stack.names.lists.items():
        own = kept_of[path] = [layer - first for layer in kept if first <= layer < first + depth]
        section, name = sections.get(_part(path)) or sections[""]
        if len(own) < depth and getattr(section, "hidden_size_per_layer_input", 0):
            raise ValueError(
                f"{type(section).__name__} has embeddings of each layer (hidden_size_per_layer_input), which are one "
                "table: set `adapter_layers` in place of `stage_layers`, so that all layers compute."
            )
        is_own = section is not config or len(sections) == 1  # in one for both, a list may be of either
        types = {key: [each[index] for index in own] for key, each in _types_of(section, depth).items()}
        if is_own:
            _shorten_lists(section, depth, own)
        setattr(section, name, len(own))
        if is_own and types != _types_of(section, len(own)):
            raise ValueError(
                f"{type(section).__name__} computes {', '.join(types)} from layers' numbers, which are others in a "
                f"submodel of layers {own}: set `adapter_layers` in place of `stage_layers`, so that all compute."
            )
        old = model.get_submodule(path)
        memo[id(old)] = nn.ModuleList(copy.deepcopy(old[index], memo) for index in own)
        first += depth
    shorter = copy.deepcopy(model, memo)
    for path in names.lists:
        for index, (before, layer) in enumerate(
            zip(kept_of[path], shorter.get_submodule(path).children(), strict=True)
        ):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
                if getattr(module, "layer_id", None) == before:  # GPT-Neo's name of it
                    module.layer_id = index
        inner = getattr(shorter.get_submodule(path.rpartition(".")[0]), "config", config)
        if not any(inner is known for known in (config, *(section for section, _ in sections.values()))):
            inner.num_hidden_layers = names.lists[path]  # T5 gives each stack a config of its own
    return shorter


def shared_parts(model: nn.Module) -> dict[int, Any]:
    """What a copy of a model shares with it, as `copy.deepcopy` takes it: parameters, buffers, and the states in which
    bitsandbytes keeps the scales of quantised weights (of 8-bit ones, from the parameter's first use on)."""
    tensors = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    states = [module.state for module in model.modules() if hasattr(getattr(module, "state", None), "SCB")]
    states += [module.quant_state for module in model.modules() if getattr(module, "quant_state", None) is not None]
    return tensors | {id(state): state for state in states}


def _types_of(config: PretrainedConfig, depth: int) -> dict[str, list]:
    """The lists of a config that say what each of `depth` layers is."""
    given = {name: getattr(config, name, None) for name in _TYPES}
    return {name: each for name, each in given.items() if isinstance(each, list) and len(each) == depth}


def _shorten_lists(config: PretrainedConfig, depth: int, kept: Sequence[int]) -> None:
    """Shorten, in place, the lists of a config that have a value for each layer."""
    others = ("token_id", "architectures", "conv_dim", "conv_stride", "conv_kernel")  # convolutions before the stack
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth and not key.endswith(others):
            setattr(config, key, [value[index] for index in kept])
