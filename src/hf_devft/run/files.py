"""Writing that is never seen half done: to a temporary name, then rename."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Give a new, empty folder that takes the name `target` when the block ends without an error.

    What stood there before stays until then. A folder left behind by an interrupted write is cleared.
    """
    target = Path(target)
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(temporary)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a path to write to that takes the name `target` when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Force a folder onto the disk before it takes its name, so that it is whole after a power failure, too."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def delete_folders(paths: Iterable[Path], leftovers: Iterable[Path]) -> None:
    """Delete folders that must not be met half deleted: rename each, then delete it.

    Args:
        leftovers: what a kill may have left of earlier deletions.
    """
    renamed = [path.rename(path.with_name(f".{path.name}.old")) for path in paths]
    for folder in [*leftovers, *renamed]:
        shutil.rmtree(folder, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the disk has no links. For files that are never written
    to again; what was at `target` is deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def replace_files(source: Path, target: Path) -> None:
    """Move every file and folder of `source` over its namesake in `target`, one rename each."""
    for entry in source.iterdir():
        if entry.is_dir():
            shutil.rmtree(target / entry.name, ignore_errors=True)
        entry.replace(target / entry.name)
