"""What a forward pass keeps for the backward pass, found without memory."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from hf_devft.models.counted_logits import counts_logits, memory_of_loss
from hf_devft.models.layer_stack import watch_lengths


@dataclass(eq=False)
class _Kept:
    """A tensor that is kept for the backward pass, for as long as it is."""

    tensor: torch.Tensor


def activations(
    model: PeftModel,
    rows: int,
    length: int,
    checkpointing: bool = False,
    all_logits: bool = True,
    half: bool = False,
) -> tuple[int, list[int]]:
    """What a forward pass of `rows` rows keeps for the backward pass, in bytes, with the gradient of the largest of
    it; and the lengths of the sequences that went through each stack of layers. Found by running it on tensors without
    memory.

    Args:
        model: with its adapter; of no use afterwards.
        length: tokens of a row (samples, of a model that reads sound waves).
        checkpointing: whether layers are computed again in the backward pass.
        all_logits: whether the loss is computed as the model does it, or in pieces where that can be; see
            `count_logits`.
        half: whether logits are of half precision.
    """
    base = model.get_base_model()
    example: dict[str, Any] = _example(base, rows, length)
    after = moment = 0
    if not all_logits and counts_logits(base):
        after, moment = memory_of_loss(base, rows * length, half)
        example = {"input_ids": example["input_ids"], "logits_to_keep": 1}
    kept: WeakSet[_Kept] = WeakSet()  # not what nothing needs any more, such as inputs of layers without gradient

    def pack(tensor: torch.Tensor) -> _Kept:
        kept.add(saved := _Kept(tensor))
        return saved

    # Not on the meta device, where attention takes a slower path that keeps its scores.
    with FakeTensorMode(allow_non_fake_inputs=True), saved_tensors_hooks(pack, lambda saved: saved.tensor):
        model = model.to_empty(device="cpu").train()
        ours = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        model.config.use_cache = False  # as `Trainer` has it
        if checkpointing:
            base.activation_checkpointing_enable()
            base.disable_input_require_grads()  # as in a run, but for reentrant checkpointing
        lengths, _ = watch_lengths(base)
        output = model(**example)
        sizes_of = {(storage := saved.tensor.untyped_storage())._cdata: storage.nbytes() for saved in kept}
        sizes = [size for key, size in sizes_of.items() if key not in ours]
        del output
    return sum(sizes) + after + max(moment, *sizes, 0), lengths


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
