"""Reading files that anybody may have written: regular files only, of the right form, unchanged since they were
written where that can be told."""

import json
import stat
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from hf_devft.files.checksums import verify


Record = TypeVar("Record")

_JSON_LIMIT = 64 * 2**20  # bytes; the log of 100,000 rounds takes half of it
FLOATS = ("F16", "BF16", "F32", "F64")
# What no adapter or layer that was trained has in it, and what still has a finite square, and a sum of such.
LARGEST = 1e6


def check_regular(path: Path) -> None:
    """Refuse what is no regular file, before it is opened: to open a named pipe may never end.

    Raises:
        OSError: there is nothing, or it cannot be looked at.
        ValueError: it is something else.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise type(error)(error.errno, f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no regular file: put the run's own file there.")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or not as it was written; see `verify`.
    """
    check_regular(path)
    if (size := path.stat().st_size) > _JSON_LIMIT:
        raise ValueError(f"{path} has {size} bytes, {_JSON_LIMIT} at most are read: it is not a run's.")
    verify(path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable JSON: {error}. Fetch it again, whole.") from error


def read_record(path: Path, schema: type[Record]) -> Record:
    """Read a JSON file as a dataclass, or a type made of some. Keys that it does not have are ignored.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or has values of other types or out of range; says where.
    """
    return as_record(read_json(path), schema, str(path))


def as_record(content: Any, schema: type[Record], name: str) -> Record:
    """Make a dataclass of what JSON has, as strictly as `read_record`.

    Args:
        name: what it is, as an error says it.

    Raises:
        ValueError: see `read_record`.
    """
    try:
        return _adapter(cast("Hashable", schema)).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ValueError(f"{name} is not as a run writes it: {where}: {first['msg']}.") from error


@cache
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def check_whole(path: Path) -> None:
    """Refuse a safetensors file that has not just the bytes that it says; reads no more of it than that.

    Raises:
        OSError: it cannot be read.
        ValueError: says what is wrong.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be used: {error}. Fetch it again, whole.") from error


def read_tensors(path: Path, dtypes: Collection[str] = FLOATS, largest: float = LARGEST) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Args:
        dtypes: the types that its tensors may have, as safetensors names them.
        largest: magnitude that they may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is broken or not as it was written; tensors of other types, or with values that are not finite
            or too large.
    """
    check_whole(path)  # first, as to read through one that is longer may never end
    verify(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = {name: file.get_slice(name).get_dtype() for name in names}
            if wrong := [name for name in names if found[name] not in dtypes]:
                raise ValueError(f"{wrong[0]!r} is of type {found[wrong[0]]}, not of {', '.join(dtypes)}")
            state = {name: file.get_tensor(name) for name in names}
        if wrong := [name for name, tensor in state.items() if not is_sound(tensor, largest)]:
            raise ValueError(f"{wrong[0]!r} has values that are not finite, or above {largest:g}")
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be used: {error}. Fetch it again, whole, or use an earlier one.") from error
    return state


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Within this context, errors of what was read say where it was read from."""
    try:
        yield
    except ValueError as error:
        if str(where) in str(error):
            raise
        raise ValueError(f"{where}: {error}") from error


def is_sound(tensor: torch.Tensor, largest: float = LARGEST) -> bool:
    """Whether all values are finite, and of no absurd magnitude."""
    return tensor.numel() == 0 or bool(tensor.abs().max() <= largest)  # False for NaN
