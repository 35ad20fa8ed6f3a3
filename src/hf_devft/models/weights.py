"""Read and rebuild parameters however they are stored: plain, in 4 bits, cut over processes, or in a checkpoint."""

import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors import safe_open
from torch import nn


@dataclass(frozen=True)
class Stored:
    """Where the values of a parameter on the meta device are: `weights[name]`; `keep` is what must not be deleted."""

    weights: OffloadedWeightsLoader
    name: str
    keep: Any = None

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """All values, or those of the flat tensor from `start` to `stop`; no more of the file is read."""
        where = self.weights.index[self.name]
        if "safetensors_file" not in where:
            values = self.weights[self.name]
            values = values if stop is None else values.flatten()[start:stop]
        elif stop is None:
            with safe_open(where["safetensors_file"], framework="pt") as file:
                values = file.get_tensor(where["weight_name"])  # still on the disk
        else:
            values = _read_span(where["safetensors_file"], where["weight_name"], start, stop)
        return values.to(getattr(torch, where["dtype"]))


_NOT_DENSE = (
    "the base has weights of {}: only bitsandbytes 4-bit bases can be grouped by similarity and fused. Load it in "
    '4 bits or unquantised, or use fusion="anchor" with another grouping.'
)
_REPACKED = (
    "the base has been used on this CPU, for which bitsandbytes has repacked its 4-bit weights, and cannot undo it "
    "exactly: load it again."
)
# The types of safetensors' format that a model's weights have before they are quantised.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@functools.lru_cache(maxsize=64)
def _header(path: str, changed: int) -> tuple[int, dict[str, dict]]:
    """Where the values begin, and {name: dtype, shape and offsets from there}, in a file that was `changed` then."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def _read_span(path: str, name: str, start: int, stop: int) -> torch.Tensor:
    """`safe_open(path).get_tensor(name).flatten()[start:stop]`, by a plain read: to map the file into memory for each
    piece takes longer."""
    begin, tensors = _header(path, os.stat(path).st_mtime_ns)
    about = tensors[name]
    if about["dtype"] not in _DTYPES:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).flatten()[start:stop]
    values = torch.empty(min(stop, math.prod(about["shape"])) - start, dtype=_DTYPES[about["dtype"]])
    view = memoryview(values.view(torch.uint8).numpy())
    with open(path, "rb", buffering=0) as file:
        file.seek(begin + about["data_offsets"][0] + start * values.itemsize)
        while len(view):
            if not (count := file.readinto(view)):  # one call may read less than all
                raise OSError(f"{path} ends within {name!r}: fetch the checkpoint again.")
            view = view[count:]
    return values


def is_stored(parameter: torch.Tensor) -> bool:
    """Whether its values are still in the checkpoint."""
    return hasattr(parameter, "stored")


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Within this context, parameters that are still in the checkpoint have a device and a shape, but no memory."""
    owned = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_stored(parameter)
    ]
    for module, name, parameter in owned:
        empty = torch.empty(1, dtype=parameter.dtype).expand(parameter.shape)
        setattr(module, name, nn.Parameter(empty, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in owned:
            setattr(module, name, parameter)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has cut it over the processes."""
    return hasattr(parameter, "ds_id")


def is_cheap_to_read(parameter: torch.Tensor) -> bool:
    """Whether `dense` neither computes nor communicates."""
    return not is_sharded(parameter) and getattr(parameter, "quant_state", None) is None


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return parameter.ds_shape if is_sharded(parameter) else parameter.shape


def stored_bytes(parameter: torch.Tensor) -> int:
    """Bytes of the whole parameter as it is stored."""
    return shape_of(parameter).numel() * parameter.element_size()


def gathered(parameters: Iterable[torch.Tensor]) -> AbstractContextManager:
    """Within this context, sharded parameters are whole on every process; to be entered by all of them."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(sharded)


def check_dense(module: nn.Module) -> None:
    """Refuse weights that are packed into buffers, as GPTQ and AWQ do, where nobody who goes through the parameters
    sees them.

    Raises:
        ValueError: a linear module has no matrix among its parameters.
    """
    for each in module.modules():
        is_linear = hasattr(each, "in_features") or hasattr(each, "infeatures")  # as older kernels call it
        has_matrix = any(parameter.dim() > 1 for parameter in each.parameters())
        packed = next((b for b in each.buffers(recurse=False) if b.dim() > 1 and not b.is_floating_point()), None)
        if is_linear and not has_matrix and packed is not None:
            raise ValueError(_NOT_DENSE.format(packed.dtype))


def dense(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter's values: dequantised where it is a loaded bitsandbytes `Params4bit`, gathered where it is
    sharded, read where it is stored, else itself.

    Raises:
        ValueError: integers of another quantisation, which cannot be compared or added, or 4-bit weights that
            bitsandbytes has repacked.
    """
    if is_stored(parameter):
        return parameter.stored.read()
    if is_sharded(parameter):
        with gathered([parameter]):
            return parameter.data.clone()
    state = getattr(parameter, "quant_state", None)
    if state is None and not parameter.is_floating_point():
        raise ValueError(_NOT_DENSE.format(parameter.dtype))
    if state is None:
        return parameter
    if _is_repacked(parameter):
        raise ValueError(_REPACKED)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def read_slice(parameter: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """`dense(parameter).flatten()[start:stop]`, of a stored parameter without reading the rest."""
    if is_stored(parameter):
        return parameter.stored.read(start, stop)
    return dense(parameter).detach().flatten()[start:stop]


def piece_size(parameter: torch.Tensor) -> int:
    """How many values to read at once: what a processor's cache holds, or more where each piece has a price of its own
    (on a GPU, and in a checkpoint that must be read whole)."""
    slow = is_stored(parameter) and "safetensors_file" not in parameter.stored.weights.index[parameter.stored.name]
    return 2**20 if slow or not (is_stored(parameter) or parameter.device.type == "cpu") else 2**16


def keep_readable(model: nn.Module) -> None:
    """Keep an evaluation on a CPU from repacking 4-bit weights for bitsandbytes' inference kernels: they could neither
    be read nor passed a gradient through, and it cannot be undone exactly.

    Raises:
        ValueError: one was before.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if _is_repacked(getattr(module, "weight", None)):
            raise ValueError(_REPACKED)


def _is_repacked(parameter: torch.Tensor | None) -> bool:
    return bool(getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False))


class DenseValues(Sequence):
    """The values of parameters, each read when it is asked for."""

    def __init__(self, parameters: list[nn.Parameter]):
        self._parameters = parameters

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, index):
        return dense(self._parameters[index])


def store_like(values: torch.Tensor, parameter: nn.Parameter) -> nn.Parameter:
    """Make a frozen parameter that stores `values` as `parameter` stores its own: dtype, device, quantisation,
    shards."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        new = nn.Parameter(values.to(parameter.dtype), requires_grad=False)
        if is_sharded(parameter):
            parameter.convert_to_zero_parameters(param_list=[new])
        return new
    from bitsandbytes.nn import Params4bit

    return Params4bit(
        values.to(state.dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=parameter.quant_storage,
    ).to(parameter.device)
