"""The configs that come with the package, which are those of recipes/configs."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path


_CONFIGS = importlib.resources.files("hf_devft.configs")


def packaged_configs() -> list[str]:
    """Return their names."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _CONFIGS.iterdir() if entry.name.endswith(".yaml"))


_NAMES = ", ".join(packaged_configs())


def packaged_config(name: str) -> Path:
    """Return where the one of this name would be."""
    return Path(str(_CONFIGS / f"{name}.yaml"))


def find_config(name: str) -> Path:
    """Find a config by its path, or its name among these.

    Raises:
        ValueError: there is neither.
    """
    for path in (Path(name), packaged_config(name)):
        if path.is_file():
            return path
    raise ValueError(f"there is no config {name}: give the path of a YAML file, or one of {_NAMES}.")


def take_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Take `--config` out of a command line; returns which one it names, and the rest.

    Raises:
        ValueError: it names none, or one that is not there.
    """
    rest = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in rest:
        return None, rest
    position = rest.index("--config")
    if rest.count("--config") > 1:
        raise ValueError("--config is given twice: leave one out (`devft quickstart` has its own; use `devft train`).")
    if position + 1 == len(rest) or rest[position + 1].startswith("--"):
        raise ValueError(f"--config needs the path of a YAML file, or one of {_NAMES}.")
    return find_config(rest[position + 1]), rest[:position] + rest[position + 2 :]
