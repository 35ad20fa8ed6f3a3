"""The configs that come with the package, which are those of recipes/configs."""

import importlib.resources
from pathlib import Path


_CONFIGS = importlib.resources.files("hf_devft.configs")


def packaged_configs() -> list[str]:
    """Return their names."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _CONFIGS.iterdir() if entry.name.endswith(".yaml"))


def packaged_config(name: str) -> Path:
    """Return where the one of this name would be."""
    return Path(str(_CONFIGS / f"{name}.yaml"))


def find_config(name: str) -> Path:
    """Find a config by its path, or its name among these."""
    packaged = packaged_config(name)
    return packaged if not Path(name).exists() and packaged.is_file() else Path(name)
