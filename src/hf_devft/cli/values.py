"""Whether what a YAML file says for an option is of the option's type."""

import types
from typing import Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError


_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a mapping",
    type(None): "nothing",
}  # fmt: skip


def check_value(key: str, value: Any, hint: Any, where: str) -> None:
    """Refuse a value that is not of an option's type, which would only be found out where it is used.

    Args:
        hint: the option's annotation; one that has others than Python's own types is not looked at.
        where: the value is, as an error has it.

    Raises:
        ValueError: says what is allowed.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if not {get_origin(kind) or kind for kind in kinds} <= _NAMES.keys():
        return
    try:
        TypeAdapter(hint).validate_python(value, strict=not isinstance(value, str))  # YAML reads 1e-3 as text
    except ValidationError as error:
        allowed = " or ".join(_name(kind) for kind in kinds)
        raise ValueError(f"{key}={value!r} in {where}: give {allowed}.") from error


def _name(kind: Any) -> str:
    items = get_args(kind)
    of = f" of {_NAMES[items[0]].removeprefix('a ')}s" if get_origin(kind) is list and items[0] in _NAMES else ""
    return _NAMES[get_origin(kind) or kind] + of
