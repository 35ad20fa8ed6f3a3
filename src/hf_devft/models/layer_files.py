"""Files of a submodel's healed layers, or of its bridges: their weights, by stage."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_devft.models.layout import State


def healed_path(folder: str | Path, stage: int | str) -> Path:
    """Return where a folder has the healed layers of a stage ("*": of any)."""
    return Path(folder, f"healed-{stage}.safetensors")


def save_healed(path: Path, state: State) -> None:
    """Write `taught_state` in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary, metadata={"format": "pt"}
    )
    temporary.replace(path)


def read_healed(path: Path) -> State:
    """Read what `save_healed` has written.

    Raises:
        ValueError: the file is missing or broken.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the submodel was healed or bridged, but {path} cannot be read: {error}. Fetch the run's folder again, "
            "whole."
        ) from error
