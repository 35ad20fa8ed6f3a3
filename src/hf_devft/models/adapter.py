"""Put a LoRA adapter on a base, and take it off again."""

import copy
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_devft.models.initialisation import without_weight_based_init
from hf_devft.models.layer_stack import shared_parts
from hf_devft.models.layout import State
from hf_devft.models.saved_modules import train_saved_modules_in_float32
from hf_devft.models.weights import gathered, stand_ins


def new_adapter(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put a new adapter on `base` (changed in place), as `get_peft_model` does; its config has the base's revision,
    which PEFT's auto classes load, and modules that are trained whole are in float32, as LoRA is."""
    config.revision = getattr(base.config, "_commit_hash", None) or config.revision
    with warnings.catch_warnings(), stand_ins(base):  # PEFT puts an adapter where its layer is
        # PEFT still reads an alias that transformers 5 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(base, config)
    train_saved_modules_in_float32(model)
    return model


def attach_adapter(base: PreTrainedModel, config: PeftConfig, state: State, grows: bool = False) -> PeftModel:
    """Put a trainable adapter that holds `state` on `base` (changed in place). Leaves the random state as it is.

    Args:
        grows: whether tensors that `state` lacks are as a new adapter has them.

    Raises:
        ValueError: the adapter's tensors are not those of this base and config.
    """
    config = without_weight_based_init(config)
    config.inference_mode = False
    config.base_model_name_or_path = base.__dict__.get("name_or_path") or None  # PEFT warns of any other
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Of a head that is tied to the embeddings; where it is the user's, the trainer's own adapter has said so.
        warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        model = new_adapter(base, config)
    load_adapter_state(model, adapter_state(model) | state if grows else state)
    return model


def chooses_layers(config: PeftConfig | None) -> bool:
    """Whether an adapter is for some layers only."""
    return getattr(config, "layers_to_transform", None) is not None


def chosen_layers(config: PeftConfig | None) -> set[int] | None:
    """The numbers of the layers that an adapter is for; None for all."""
    if not chooses_layers(config):
        return None
    chosen = config.layers_to_transform
    return {chosen} if isinstance(chosen, int) else set(chosen)


def remap_layers_to_transform(
    config: PeftConfig, kept: Sequence[int], adapted: Sequence[int] | None = None
) -> PeftConfig:
    """Copy the config of an adapter for a model that has only the layers `kept`: `layers_to_transform` has the numbers
    that layers have there.

    Args:
        adapted: those there that have an adapter, where the config chooses none; None for all.
    """
    if adapted is not None:
        config = copy.deepcopy(config)
        config.layers_to_transform = list(adapted)
        return config
    if (chosen := chosen_layers(config)) is None:
        return config
    config = copy.deepcopy(config)
    config.layers_to_transform = [index for index, layer in enumerate(kept) if layer in chosen]
    if not config.layers_to_transform:  # which PEFT takes for all
        raise ValueError(
            f"layers_to_transform={sorted(chosen)} has none of a submodel's layers {list(kept)}, so that nothing "
            "of it would be trained: choose more layers, or let stages have more."
        )
    return config


def head_name(base: PreTrainedModel) -> str | None:
    """The last part of the name of a model's output embeddings, where it has some."""
    if (head := base.get_output_embeddings()) is None:
        return None
    return next(name for name, module in base.named_modules() if module is head).rpartition(".")[2]


def with_head(config: PeftConfig, base: PreTrainedModel) -> tuple[PeftConfig, str]:
    """Copy the config of an adapter so that it is on the output embeddings, too; returns it, and their name."""
    name = head_name(base)
    assert name is not None
    config = copy.deepcopy(config)
    if config.target_modules == "all-linear":  # as PEFT has not taken it apart yet
        linear = (path for path, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
        config.target_modules = {*(path.rpartition(".")[2] for path in linear)}
    elif isinstance(config.target_modules, str):
        config.target_modules = rf"(?:{config.target_modules})|(?:.*\.)?{name}"
    else:
        config.target_modules = {*config.target_modules, name}
    return config, name


def own_adapted_weights(model: PeftModel, tied_only: bool = False) -> None:
    """Give the modules that have an adapter copies of their weights, in place, so that merging it changes no other
    model's, nor another module of this one: output embeddings with an adapter are then no longer tied to the input's.

    Args:
        tied_only: copy just what another module of the model has, too; where no other model has any of it.
    """
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for module in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        base = module.get_base_layer()
        for name, weight in list(base.named_parameters(recurse=False)):
            if not tied_only or uses[id(weight)] > 1:
                setattr(base, name, copy.deepcopy(weight))
        if hasattr(getattr(base, "state", None), "SCB"):  # of 8-bit weights, which merging writes to
            base.state = copy.copy(base.state)


def shared_copy(model: PeftModel) -> PeftModel:
    """Copy a model's Python structure: its parameters and buffers are those of `model`."""
    return copy.deepcopy(model, shared_parts(model))


def detach_adapter(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off; returns the base as it was before `attach_adapter`. `model` is of no use afterwards."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    base = model.unload()
    for name, module in wrapped.items():  # PEFT leaves the trained copies
        base.set_submodule(name.removeprefix("base_model.model."), module.original_module)
    return base


def adapter_state(model: PeftModel) -> State:
    """Copy the active adapter to the CPU: {PEFT key: tensor}."""
    with gathered(parameter for parameter in model.parameters() if parameter.requires_grad):
        state = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}


def load_adapter_state(model: PeftModel, state: State) -> None:
    """Write `state` into the model's adapter, in place.

    Raises:
        ValueError: names or shapes differ.
    """
    name = model.active_adapter
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wrong = sorted(set(expected) ^ set(state)) or [key for key in state if state[key].shape != expected[key].shape]
    if wrong:
        raise ValueError(
            f"the adapter does not fit the model: {len(wrong)} tensors differ in name or shape, such as {wrong[0]!r}. "
            "Use the base and the LoRA config that it was made with."
        )
    set_peft_model_state_dict(model, state, adapter_name=name)
