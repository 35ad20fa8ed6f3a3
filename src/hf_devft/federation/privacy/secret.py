"""The secret that sampling and noise are drawn by: who knows it can take the noise away again."""

import os
import secrets
from pathlib import Path


SECRET = "privacy_secret"


def read_secret(folder: str | Path, is_new: bool = True) -> int:
    """Read the secret of the runs in a folder; draws one from the system's entropy where there is none.

    It is in a file of its own, for its owner's eyes only, and is never pushed.

    Args:
        is_new: whether one may be drawn.

    Raises:
        ValueError: the file holds no number, or is missing.
    """
    path = Path(folder) / SECRET
    if not path.exists() and not is_new:
        raise ValueError(
            f"{path} is missing, by which this run's clients and noise were drawn: put it back, or start anew."
        )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{SECRET}.{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_text(f"{secrets.randbits(128)}\n")
        draft.replace(path)
    try:
        return int(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} holds no number: restore it, or delete it, and a new one is drawn.") from error
