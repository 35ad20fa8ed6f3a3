"""Size and SHA-256 of what is written, beside it, so that a damaged file is known before anything is made of it."""

import hashlib
import json
from pathlib import Path
from typing import Any


CHECKSUMS = "checksums.json"
_LIMIT = 2**20  # bytes of the list
_BLOCK = 2**20


def note_checksum(path: Path) -> None:
    """Note a file in the list of its folder."""
    known, entry = _known(path.parent), {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if known.get(path.name) != entry:
        _write(path.parent, known | {path.name: entry})


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
    entry = _known(path.parent).get(path.name)
    # The size first: of a file that has grown without end, no checksum is ever made.
    if entry is not None and (path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]):
        raise ValueError(
            f"{path} is damaged or was changed: {CHECKSUMS} beside it has another size or SHA-256 of it. Fetch it "
            f"again; or delete {CHECKSUMS}, if the change is yours."
        )


def sha256(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    """The list of a folder; nothing where there is none."""
    listed = folder / CHECKSUMS
    if not listed.exists():
        return {}
    try:
        if not listed.is_file() or listed.stat().st_size > _LIMIT:
            raise ValueError("it is no file, or too large")
        known = json.loads(listed.read_bytes())
        entries = known.values() if isinstance(known, dict) else [None]
        if not all(isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} for entry in entries):
            raise ValueError('it is not {name: {"bytes": ..., "sha256": ...}}')
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listed} is no list of checksums ({error}): fetch it again, or delete it.") from error
    return known


def _write(folder: Path, known: dict[str, dict[str, Any]]) -> None:
    temporary = folder / f".{CHECKSUMS}.tmp"
    temporary.write_text(json.dumps(known, indent=2) + "\n")
    temporary.replace(folder / CHECKSUMS)
