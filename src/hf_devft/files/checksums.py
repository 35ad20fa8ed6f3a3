"""SHA-256 of what is written, beside it, so that a damaged file is known before anything is made of it."""

import hashlib
import json
from pathlib import Path


CHECKSUMS = "checksums.json"
_LIMIT = 2**20  # bytes of the list
_BLOCK = 2**20


def note_checksum(path: Path) -> None:
    """Note a file in the list of its folder."""
    known = _known(path.parent)
    if known.get(path.name) != (digest := sha256(path)):
        _write(path.parent, known | {path.name: digest})


def forget_checksum(path: Path) -> None:
    """Take a file out of the list of its folder, before another one takes its place: whoever comes between the two
    finds it unlisted, not damaged."""
    known = _known(path.parent)
    if known.pop(path.name, None) is not None:
        _write(path.parent, known)


def verify(path: Path) -> None:
    """Compare a file with the list of its folder, where that has it.

    Raises:
        ValueError: it differs, or the list cannot be read.
    """
    digest = _known(path.parent).get(path.name)
    if digest is not None and digest != sha256(path):
        raise ValueError(
            f"{path} is damaged or was changed: {CHECKSUMS} beside it has another SHA-256, {digest[:8]}... Fetch it "
            f"again; or delete {CHECKSUMS}, if the change is yours."
        )


def sha256(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _known(folder: Path) -> dict[str, str]:
    """The list of a folder; nothing where there is none."""
    listed = folder / CHECKSUMS
    if not listed.exists():
        return {}
    try:
        if not listed.is_file() or listed.stat().st_size > _LIMIT:
            raise ValueError("it is no file, or too large")
        known = json.loads(listed.read_bytes())
        if not isinstance(known, dict) or not all(isinstance(digest, str) for digest in known.values()):
            raise ValueError("it is not {name: SHA-256}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listed} is no list of checksums ({error}): fetch it again, or delete it.") from error
    return known


def _write(folder: Path, known: dict[str, str]) -> None:
    temporary = folder / f".{CHECKSUMS}.tmp"
    temporary.write_text(json.dumps(known, indent=2) + "\n")
    temporary.replace(folder / CHECKSUMS)
