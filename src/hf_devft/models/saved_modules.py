"""Modules that are trained whole, PEFT's `modules_to_save`, beside a base in half precision."""

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


def train_saved_modules_in_float32(model: PeftModel) -> None:
    """Have each module that is trained whole keep its weights in float32, as LoRA does, compute in that, and give back
    what the base beside it would."""
    for wrapper in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
        trained, original = wrapper.modules_to_save[model.active_adapter], wrapper.original_module
        trained.float()
        trained.register_forward_pre_hook(partial(_take, original), with_kwargs=True)
        trained.register_forward_hook(partial(_give, original))


# Dtypes are asked for in each call: an engine may have cast all of the model. Where both have one, nothing is done.
def _take(original: nn.Module, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    own = _dtype(module)
    if own == _dtype(original):
        return None
    return tuple(_cast(each, own) for each in args), {name: _cast(each, own) for name, each in kwargs.items()}


def _give(original: nn.Module, module: nn.Module, args: tuple, output: Any) -> Any:
    base = _dtype(original)
    return output if base == _dtype(module) else _cast(output, base)


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((each.dtype for each in module.parameters() if each.is_floating_point()), None)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors in another dtype; everything else as it is."""
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating and dtype is not None else value
