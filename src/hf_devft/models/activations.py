"""What a forward pass keeps for the backward pass, found without memory."""

import copy
import weakref
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from hf_devft.models.counted_logits import counts_logits, memory_of_loss
from hf_devft.models.flops import chosen_experts
from hf_devft.models.layer_stack import find_layer_stack, watch_lengths, with_layers


@dataclass(eq=False)
class _Kept:
    """A tensor that is kept for the backward pass, for as long as it is."""

    tensor: torch.Tensor
    times: int


class _Keeping:
    """Sees what is kept for the backward pass.

    Attributes:
        times: how many layers the one that now runs stands for.
    """

    def __init__(self) -> None:
        self.times = 1
        # Not what nothing needs any more, such as inputs of layers without gradient.
        self._kept: list[weakref.ref[_Kept]] = []

    def pack(self, tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor, self.times)
        self._kept.append(weakref.ref(kept))
        return kept

    def pass_on(self, times: int, *_: Any) -> None:
        """Called after a layer; the next one stands for so many."""
        self.times = times

    def sizes(self) -> dict[int, tuple[int, int]]:
        """{storage: (bytes, times)}, by the first that keeps it: what all layers share is kept once."""
        found: dict[int, tuple[int, int]] = {}
        for reference in self._kept:
            if (kept := reference()) is not None:
                storage = kept.tensor.untyped_storage()
                found.setdefault(storage._cdata, (storage.nbytes(), kept.times))
        return found


def activations(
    model: PreTrainedModel,
    rows: int,
    length: int,
    checkpointing: bool = False,
    all_logits: bool = True,
    half: bool = False,
) -> tuple[int, list[int]]:
    """What a forward pass of `rows` rows keeps for the backward pass, in bytes, with the gradient of the largest of
    it; and the lengths of the sequences that went through each stack of layers. Found by running it on tensors without
    memory, with two layers of each kind, as all others keep what the second one does.

    Args:
        model: with an adapter in it; stays as it is.
        length: tokens of a row (samples, of a model that reads sound waves).
        checkpointing: whether layers are computed again in the backward pass.
        all_logits: whether the loss is computed as the model does it, or in pieces where that can be; see
            `count_logits`.
        half: whether logits are of half precision.
    """
    example: dict[str, Any] = _example(model, rows, length)
    after = moment = 0
    if not all_logits and counts_logits(model):
        after, moment = memory_of_loss(model, rows * length, half)
        example = {"input_ids": example["input_ids"], "logits_to_keep": 1}
    stack = find_layer_stack(model)
    times = _times(stack.kinds, stack.layers)
    names = stack.names.keeping(list(times))
    model, scale = _emptied(with_layers(model, stack, list(times))), 1.0
    experts = chosen_experts(model)
    if any(p.dim() == 3 and p.shape[0] in experts for p in model.parameters()):  # torch knows these in bfloat16 alone
        scale = model.dtype.itemsize / 2
        model = model.to(torch.bfloat16)
    keeping = _Keeping()
    # Not on the meta device, where attention takes a slower path that keeps its scores.
    with FakeTensorMode(allow_non_fake_inputs=True), saved_tensors_hooks(keeping.pack, lambda kept: kept.tensor):
        model = model.to_empty(device="cpu").train()
        ours = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        model.config.use_cache = False  # as `Trainer` has it
        _keep_all_layers(model)
        if checkpointing:
            model.activation_checkpointing_enable()
            model.disable_input_require_grads()  # as in a run, but for reentrant checkpointing
        # After the one before, as a checkpointed layer's input is kept before the layer is called.
        for layer, following in zip(names.layers(model), [*times.values(), 1][1:], strict=True):
            layer.register_forward_hook(partial(keeping.pass_on, following))
        lengths, _ = watch_lengths(model, names)
        output = model(**example)
        sizes = [(scale * size, times) for key, (size, times) in keeping.sizes().items() if key not in ours]
        del output
    largest = max([moment, *(size for size, _ in sizes)])
    return int(sum(size * times for size, times in sizes) + after + largest), lengths


def _times(kinds: Sequence[Hashable], layers: Sequence[nn.Module]) -> dict[int, int]:
    """The layers to look at, and how many each stands for: the first of its kind for itself, the second one for all
    others. What a layer keeps depends on its adapter, too, and on whether there is one below it."""
    adapters = [tuple((name, p.shape) for name, p in layer.named_parameters() if p.requires_grad) for layer in layers]
    lowest = next((index for index, adapter in enumerate(adapters) if adapter), 0)
    alike: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, (kind, adapter) in enumerate(zip(kinds, adapters, strict=True)):
        alike[kind, adapter, (index > lowest) - (index < lowest)].append(index)
    times = {first: 1 for first, *_ in alike.values()}
    times |= {others[0]: len(others) for _, *others in alike.values() if others}
    return dict(sorted(times.items()))


def _emptied(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, but for its weights."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _keep_all_layers(model: PreTrainedModel) -> None:
    """Leave out none at random, as models of speech and older ones do while they train."""
    for owner in (model.config, *model.modules()):
        for name in vars(owner):
            if name.endswith("layerdrop"):
                setattr(owner, name, 0.0)


def _example(model: PreTrainedModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A batch as the model reads it; with labels where they are tokens."""
    config, name = model.config, model.main_input_name
    tokens = torch.zeros(rows, length, dtype=torch.long)
    inputs = {
        "input_ids": lambda: tokens,
        "pixel_values": lambda: torch.zeros(rows, config.num_channels, *[config.image_size] * 2),
        "input_features": lambda: torch.zeros(rows, config.num_mel_bins, 2 * config.max_source_positions),
        "input_values": lambda: torch.zeros(rows, length),
    }
    if name not in inputs:
        raise ValueError(f"{type(model).__name__} reads {name}: a plan knows {', '.join(inputs)}.")
    return {name: inputs[name]()} | ({"labels": tokens} if model.get_output_embeddings() is not None else {})
