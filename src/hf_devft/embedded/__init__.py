"""What ships with the package, so that it works with no network: a small base model and a task generator."""

import difflib
from pathlib import Path

from hf_devft.embedded.families import task_dataset


EMBEDDED = "embedded"
BASE_PATH = Path(__file__).parent / "base"


def resolve_model_name(name: str) -> str:
    """The path of the embedded base for "embedded"; any other name as it is.

    Raises:
        ValueError: it is nearly that, and no folder's.
    """
    if name == EMBEDDED:
        return str(BASE_PATH)
    if difflib.get_close_matches(name.lower(), [EMBEDDED], cutoff=0.8) and not Path(name).exists():
        raise ValueError(f"model_name_or_path={name!r} is no folder: did you mean {EMBEDDED!r}?")
    return name


def portable_name(name: str) -> str:
    """The inverse of `resolve_model_name`: what a base is called on any machine that has this package."""
    return EMBEDDED if name == str(BASE_PATH) else name


__all__ = ["BASE_PATH", "EMBEDDED", "portable_name", "resolve_model_name", "task_dataset"]
