"""The output folder of a run: one run at a time, and not another one's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME

from hf_devft.configuration import DevFTConfig
from hf_devft.configuration.stage_folder import LEDGER, PLOT, STAGE_CONFIG_NAME
from hf_devft.files import CHECKSUMS, delete_folders
from hf_devft.hub.model_card import TAG
from hf_devft.hub.publisher import left_copies
from hf_devft.models.adapter_files import ADAPTER_WEIGHTS
from hf_devft.run.checkpoint import RUN_STATE


LOCK = ".run.lock"
_LEFT = re.compile(r"(stage|checkpoint)-\d+")
_ROOT = (
    STAGE_CONFIG_NAME, CONFIG_NAME, ADAPTER_WEIGHTS, LEDGER, RUN_STATE, TRAINER_STATE_NAME, CHECKSUMS, PLOT,
    "README.md",
)  # fmt: skip


@contextmanager
def claim(args: DevFTConfig, is_new: bool) -> Iterator[None]:
    """Keep `args.output_dir` for this run alone, within this context; the lock ends with the process, however that
    ends.

    Args:
        is_new: whether the run starts there; then what another one has left there is deleted with
            `args.overwrite_output_dir`, and refused without.

    Raises:
        ValueError: another run is at work there, or has left stages or checkpoints; a README that is no card.
    """
    folder = Path(args.output_dir)
    lock, refusal = None, None
    try:
        if args.process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK, timeout=0)
            refusal = _refusal(lock, folder, is_new, args.overwrite_output_dir)
        if (refusal := broadcast_object_list([refusal])[0]) is not None:
            raise ValueError(refusal)
        yield
    finally:
        if lock is not None:
            lock.release()


def _refusal(lock: FileLock, folder: Path, is_new: bool, overwrite: bool) -> str | None:
    """Lock a folder and clear it for a new run; returns why not."""
    try:
        lock.acquire()
    except Timeout:
        return f"another run is at work in {folder}: wait until it is over, or choose another `output_dir`."
    delete_folders([], leftovers=left_copies(folder))
    if not is_new:
        return None
    if (why := _why_not_new(folder, overwrite)) is not None:
        return why
    left = _left_in(folder)
    copies = {path.name for stage in left for path in stage.iterdir() if path.is_file()}  # a tokenizer's, say
    for name in {*_ROOT, *copies} if left else ():
        (folder / name).unlink(missing_ok=True)
    delete_folders(left, leftovers=[])
    return None


def check_free(args: DevFTConfig) -> None:
    """Refuse a new run where `claim` would, before data or base are loaded.

    Raises:
        ValueError: says what to do.
    """
    folder, given = Path(args.output_dir), args.resume_from_checkpoint
    if given in (True, "last") or goes_on_in(folder, given):
        return
    if (why := _why_not_new(folder, args.overwrite_output_dir)) is not None:
        raise ValueError(why)


def goes_on_in(output_dir: str | Path, checkpoint: str | Path | None) -> bool:
    """Whether what a run goes on from lies in its own output folder, or is that, so that the run there is this one."""
    if checkpoint is None:
        return False
    path = Path(checkpoint).resolve()
    return Path(output_dir).resolve() in (path, path.parent)


def _why_not_new(folder: Path, overwrite: bool) -> str | None:
    """Why no run can start in a folder: another one's stages or checkpoints are there, or a README that no run has
    written; or None."""
    if not overwrite and (left := _left_in(folder)):
        return (
            f"{folder} holds a run already ({', '.join(path.name for path in left[-3:])}): go on with it "
            'by `--resume_from_checkpoint last` (in Python `train("last")`), choose another `output_dir`, or delete '
            "it by `--overwrite_output_dir true` (in Python `overwrite_output_dir=True`)."
        )
    readme = folder / "README.md"
    if readme.exists() and f"- {TAG}\n" not in readme.read_text(errors="replace"):
        return f"{readme} is no card of a run, and would be replaced by one: choose another `output_dir`."
    return None


def _left_in(folder: Path) -> list[Path]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in entries if path.is_dir() and _LEFT.fullmatch(path.name))
