"""Files of a submodel's healed layers, or of its bridges: their weights, by stage."""

from pathlib import Path

from hf_devft.files import read_tensors
from hf_devft.models.layout import State


def healed_path(folder: str | Path, stage: int | str) -> Path:
    """Return where a folder has the healed layers of a stage ("*": of any)."""
    return Path(folder, f"healed-{stage}.safetensors")


def read_healed(path: Path) -> State:
    """Read `taught_state` again.

    Raises:
        ValueError: the file is missing or broken.
    """
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"the submodel was healed or bridged, but its layers cannot be read: {error}") from error
