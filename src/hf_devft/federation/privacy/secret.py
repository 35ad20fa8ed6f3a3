"""The secret that sampling and noise are drawn by: who knows it can take the noise away again."""

import secrets
from pathlib import Path

from hf_devft.files import atomic_file


SECRET = "privacy_secret"


def read_secret(folder: str | Path, rows: str = "", is_new: bool = True) -> int:
    """Read the secret of the runs in a folder; draws one from the system's entropy where there is none.

    It is in a file of its own, for its owner's eyes only, and is never pushed; so beside it is whose rows the run
    under way has, which nothing else that is written may tell.

    Args:
        rows: a digest of all clients' rows. is_new: whether a run begins, so that a secret may be drawn.

    Raises:
        ValueError: the file holds no number, or is missing; or the run that goes on had other rows.
    """
    path = Path(folder) / SECRET
    if not path.exists() and not is_new:
        raise ValueError(
            f"{path} is missing, by which this run's clients and noise were drawn: put it back, or start anew."
        )
    secret, known = _read(path) if path.exists() else (secrets.randbits(128), "")
    if not is_new and known not in ("", rows):
        raise ValueError(
            f"the run in {folder} had other rows, or dealt out otherwise, by which its privacy is accounted for: go "
            "on with the same, or start anew."
        )
    if known != rows or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft:
            draft.touch(mode=0o600)
            draft.write_text(f"{secret}\n{rows}\n")
    return secret


def _read(path: Path) -> tuple[int, str]:
    """(secret, digest of the rows, if it is there)."""
    secret, _, rows = path.read_text().strip().partition("\n")
    try:
        return int(secret), rows
    except ValueError as error:
        raise ValueError(f"{path} holds no number: restore it, or delete it, and a new one is drawn.") from error
