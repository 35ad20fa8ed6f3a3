"""The submodels of a run's stages, without memory: what they are, weigh and keep."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.models.activations import activations
from hf_devft.models.adapter import chosen_layers, new_adapter, remap_layers_to_transform, with_head
from hf_devft.models.initialisation import without_weight_based_init
from hf_devft.models.layer_stack import find_layer_stack, with_layers
from hf_devft.stages.bridges import add_bridges
from hf_devft.stages.grouping import GroupingTask, group_layers
from hf_devft.stages.submodel import layers_of
from hf_devft.stages.transfer import kinds_by_adapter


# Of a client's trained values in float32: themselves, their gradient, AdamW's two moments.
TRAINED_BYTES = 16


class Activations(NamedTuple):
    """Bytes that are kept for the backward pass, without and with checkpointing, and each stack's length."""

    everything: int
    checkpointed: int
    lengths: list[int]


class PlannedSubmodels:
    """The submodels of a run's stages by their number of layers, without memory; each is looked at once.

    Args:
        args: of the run.
        base: without its adapter; may be on the meta device.
        peft_config: of the full-depth adapter.
        all_logits: whether the loss is computed of all logits.
    """

    def __init__(self, args: DevFTConfig, base: PreTrainedModel, peft_config: PeftConfig, all_logits: bool):
        self._args, self._base, self._peft_config, self._all_logits = args, base, peft_config, all_logits
        self._stack = find_layer_stack(base, args.stack)
        self._known = functools.cache(self._model), functools.cache(self._activations)

    def model(self, stage: StageConfig) -> tuple[PeftModel, int]:
        """(with its adapter, bytes of its base weights)."""
        return self._known[0](stage.num_layers, tuple(stage.adapted or ()))

    def whole(self, stage: StageConfig) -> tuple[PeftModel, int]:
        """Likewise, of the whole model that a stage is a part of."""
        return self.model(whole_stage(stage))

    def activations(self, stage: StageConfig, rows: int, length: int) -> Activations:
        """See `activations`."""
        return self._known[1](stage.num_layers, tuple(stage.adapted or ()), rows, length)

    def _model(self, layers: int, adapted: tuple[int, ...]) -> tuple[PeftModel, int]:
        args, stack, config = self._args, self._stack, self._peft_config
        chosen = chosen_layers(config)  # those share no group with the others
        kinds = stack.kinds if chosen is None else kinds_by_adapter(stack.kinds, chosen)
        groups = group_layers(GroupingTask(kinds, layers), "even")  # of any grouping's sizes
        submodel = with_layers(self._base, stack, [group[0] for group in groups])
        own = layers_of(submodel, stack, groups)
        if args.fusion == "bridge":
            add_bridges(submodel, own, groups)
        model_options: Any = args.model_init_kwargs or {}
        stored = _base_bytes(submodel, own, model_options.get("quantization_config"))
        if args.temporary_head and layers < len(stack):
            config, _ = with_head(config, submodel)
        config = remap_layers_to_transform(config, [group[0] for group in groups], adapted or None)
        config = without_weight_based_init(config)
        with torch.device("meta"):  # no value is drawn for an adapter that is only looked at
            return new_adapter(submodel, config), stored

    def _activations(self, layers: int, adapted: tuple[int, ...], rows: int, length: int) -> Activations:
        args = self._args
        model: Any = self._known[0](layers, adapted)[0].get_base_model()
        half = args.bf16 or args.fp16 or model.dtype != torch.float32
        look = functools.partial(activations, model, rows, length, all_logits=self._all_logits, half=half)
        everything, lengths = look()
        if not (model.supports_gradient_checkpointing or args.activation_checkpointing):
            return Activations(everything, everything, lengths)
        # Each layer's input, and what one layer at a time keeps when it is computed again.
        inputs, _ = look(checkpointing=True)
        return Activations(everything, min(everything, inputs + everything // (len(adapted) or layers)), lengths)


def training_memory(base_bytes: int, trained: int, kept: int) -> int:
    """Return the bytes that a client's training takes: base, trained values, and what is kept for the backward
    pass."""
    return base_bytes + TRAINED_BYTES * trained + kept


def whole_stage(stage: StageConfig) -> StageConfig:
    """Return the stage of the whole model that a stage is a part of."""
    return replace(stage, num_layers=stage.full_layers, adapted=None)


def _base_bytes(model: PreTrainedModel, layers: list[nn.Module], quantization: Any) -> int:
    """Bytes of the weights; bitsandbytes packs the layers' matrices, with a scale for each block of 64 values.

    Args:
        quantization: a config of transformers', as an object or a dict; or None.
    """
    quantization = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization or {}
    total = sum(parameter.nbytes for parameter in model.parameters())
    packed = [m.weight for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    if quantization.get("load_in_4bit"):
        scale = 1 / 64 + 4 / (64 * 256) if quantization.get("bnb_4bit_use_double_quant") else 4 / 64
        return total - sum(round(weight.nbytes - weight.numel() * (0.5 + scale)) for weight in packed)
    if quantization.get("load_in_8bit"):
        return total - sum(weight.nbytes - weight.numel() for weight in packed)
    return total
