"""Writing that is never seen half done: to a temporary name, then rename."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_devft.files.checksums import CHECKSUMS, forget_checksum, note_checksum, verify


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Give a new, empty folder that takes the name `target` when the block ends without an error.

    What stood there before stays until then. A folder left behind by an interrupted write is cleared.

    Raises:
        OSError: what cannot be written, with its name.
    """
    target = Path(target)
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _naming(target):
            temporary.mkdir(parents=True)
            yield temporary
            _flush(temporary)  # some disks say only now that they are full
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a path to write to that takes the name `target` when the block ends without an error.

    Raises:
        OSError: it cannot be written; names it.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with _naming(target):
            yield temporary
            _flush_file(temporary)
            temporary.replace(target)
    finally:
        with suppress(OSError):  # a disk that is read-only by now, which the error says
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Within this context, an error of the system that names no file (as where a disk is full) names this one."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            number = None if error.filename is not None else error.errno
        else:  # libraries in Rust have errors of their own
            found = re.search(r"\(os error (\d+)\)", str(error))
            number = int(found[1]) if found else None
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file in one move, and note its checksum."""
    with _listed(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], listed: bool = True) -> None:
    """Write a safetensors file in one move, and note its checksum.

    Args:
        listed: whether it may be in the list of checksums, which can be pushed though the file stays.

    Raises:
        OSError: it cannot be written; names it.
    """
    # Tensors that share memory (layers that share a broadcast adapter) get one of their own, as safetensors wants it.
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with _listed(path, listed) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as all files have it; safetensors lets none but the owner read
        save_file(own, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)


@contextmanager
def _listed(path: Path, listed: bool = True) -> Iterator[Path]:
    """`atomic_file`, of a file that is in the list of checksums, or may not be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        yield temporary
        forget_checksum(path)
    if listed:
        note_checksum(path)


def _flush(folder: Path) -> None:
    """Force a folder onto the disk before it takes its name, so that it is whole after a power failure, too."""
    folders = [folder]
    for path in folder.rglob("*"):
        if path.is_dir():
            folders.append(path)
            continue
        _flush_file(path)
    for path in folders:
        with suppress(OSError):  # some file systems flush no folder, and Windows opens none
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _flush_file(path: Path) -> None:
    """Force a file onto the disk: a name that was moved before its content is of an empty file after a power
    failure."""
    with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows flushes none that is open to read
        os.fsync(file.fileno())


def delete_folders(paths: Iterable[Path], leftovers: Iterable[Path]) -> None:
    """Delete folders that must not be met half deleted: rename each, then delete it.

    Args:
        leftovers: what a kill may have left of earlier deletions.
    """
    renamed = [path.rename(path.with_name(f".{path.name}.old")) for path in paths]
    for folder in [*leftovers, *renamed]:
        shutil.rmtree(folder, ignore_errors=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the disk has no links."""
    try:
        os.link(Path(source).resolve(), target)  # a hub's cache has links that lead from there
    except OSError:
        shutil.copyfile(source, target)


def link_whole(source: Path, target: Path) -> None:
    """`link_or_copy`, of a file that is not damaged, and note its checksum. For files that are never written to
    again; what was at `target` is deleted.

    Raises:
        ValueError: `source` is damaged.
    """
    verify(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    forget_checksum(target)
    target.unlink(missing_ok=True)
    link_or_copy(source, target)
    note_checksum(target)


def replace_files(source: Path, target: Path) -> None:
    """Move every file and folder of `source` over its namesake in `target`, one rename each; the list of checksums
    last, and none is there meanwhile."""
    (target / CHECKSUMS).unlink(missing_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name == CHECKSUMS):
        if entry.is_dir():
            shutil.rmtree(target / entry.name, ignore_errors=True)
        entry.replace(target / entry.name)
