"""The output folder of a run: one run at a time, and not another one's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME

from hf_devft.configuration import DevFTConfig
from hf_devft.configuration.stage_folder import LEDGER, PLOT, STAGE_CONFIG_NAME
from hf_devft.files import CHECKSUMS, delete_folders
from hf_devft.models.adapter_files import ADAPTER_WEIGHTS
from hf_devft.run.checkpoint import RUN_STATE


LOCK = ".run.lock"
_ROOT = (
    STAGE_CONFIG_NAME, CONFIG_NAME, ADAPTER_WEIGHTS, LEDGER, RUN_STATE, TRAINER_STATE_NAME, CHECKSUMS, PLOT,
    "README.md",
)  # fmt: skip


@contextmanager
def claim(args: DevFTConfig, is_new: bool) -> Iterator[None]:
    """Keep `args.output_dir` for this run alone, within this context; the lock ends with the process, however that
    ends.

    Args:
        is_new: whether the run starts; then what another one has left there is deleted with
            `args.overwrite_output_dir`, and refused without.

    Raises:
        ValueError: another run is at work there, or has left stages or checkpoints.
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
    left = _left_in(folder) if is_new else []
    if left and not overwrite:
        return _why_taken(folder, left)
    for name in _ROOT if left else ():
        (folder / name).unlink(missing_ok=True)
    delete_folders(left, leftovers=[])
    return None


def check_free(args: DevFTConfig) -> None:
    """Refuse a new run where one has left stages or checkpoints, before data or base are loaded.

    Raises:
        ValueError: says what to do.
    """
    is_new = not (args.resume_from_checkpoint or args.resume_from_hub or args.overwrite_output_dir)
    if is_new and (left := _left_in(Path(args.output_dir))):
        raise ValueError(_why_taken(Path(args.output_dir), left))


def _why_taken(folder: Path, left: Sequence[Path]) -> str:
    return (
        f"{folder} holds a run already ({', '.join(sorted(path.name for path in left)[-3:])}): go on with it by "
        '`--resume_from_checkpoint last` (in Python `train("last")`), choose another `output_dir`, or delete it by '
        "`--overwrite_output_dir true` (in Python `overwrite_output_dir=True`)."
    )


def _left_in(folder: Path) -> list[Path]:
    return [*folder.glob("stage-*/"), *folder.glob("checkpoint-*/")]
