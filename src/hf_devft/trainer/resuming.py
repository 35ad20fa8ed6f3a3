"""Where a run goes on from, and where it pushes to."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from hf_devft.configuration import DevFTConfig
from hf_devft.files import delete_folders
from hf_devft.hub.download import download_stage, newest_commit
from hf_devft.hub.push import HubPusher, finished_stages
from hf_devft.run.checkpoint import RUN_STATE
from hf_devft.run.claim import goes_on_in


logger = logging.getLogger(__name__)


def starting_point(args: DevFTConfig, resume_from_checkpoint: str | bool | None) -> str | None:
    """Find the folder from which a run goes on: as given, or the newest checkpoint (`True`, "last"), or the newest
    stage on the Hub; None where it starts.

    Raises:
        ValueError: the repository cannot be read; `True`, and there is no checkpoint; what is given is no folder.
    """
    if resume_from_checkpoint in (True, "last"):
        folder = Path(args.output_dir)
        found = _newest(folder) if folder.is_dir() else None
        if found is None and resume_from_checkpoint is True:
            raise ValueError(f"there is no checkpoint in {args.output_dir}: start without `resume_from_checkpoint`.")
        if found is None and not args.overwrite_output_dir:
            _refuse_models_only(folder)
        resume_from_checkpoint = found
    if not resume_from_checkpoint:
        return download_last_stage(args) if args.resume_from_hub else None
    if not Path(resume_from_checkpoint).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={resume_from_checkpoint!r} is no folder: give a `checkpoint-N`, a finished "
            'stage\'s, or "last".'
        )
    if args.process_index == 0 and (later := _later(args, Path(resume_from_checkpoint))):
        logger.warning(
            f"{', '.join(later)} in {args.output_dir} stay as they are, from before: `--resume_from_checkpoint last` "
            "would go on from there, so delete them, or name the checkpoint to resume from."
        )
    return str(resume_from_checkpoint)


def _refuse_models_only(folder: Path) -> None:
    if left := [Path(each).name for each in sort_checkpoints(str(folder), use_mtime=False)]:
        raise ValueError(
            f"{folder} has {left[-1]}, but nothing that a run can go on from, as with `save_only_model`: choose "
            "another `output_dir`, or start anew by `overwrite_output_dir`."
        )


def _later(args: DevFTConfig, chosen: Path) -> list[str]:
    """The checkpoints and finished stages of later rounds than a chosen one in `args.output_dir`."""
    folder = Path(args.output_dir)
    if not goes_on_in(folder, chosen):
        return []
    begun = _rounds_done(str(chosen))
    try:
        return [Path(path).name for path, rounds in _rounds_by_folder(folder).items() if rounds > begun]
    except (OSError, ValueError):  # a broken stage that is not asked for
        return []


def stops_unsaved(args: DevFTConfig, control: TrainerControl, is_saved: bool) -> bool:
    """Whether a run was told to stop, not its stage alone, after a round that it could go on from, but for a
    checkpoint."""
    stops = control.should_training_stop and not control.should_epoch_stop
    return stops and args.save_strategy != "no" and not is_saved


@contextmanager
def keeping_the_newest(args: DevFTConfig) -> Iterator[None]:
    """Within this context transformers deletes no checkpoint: where one is to be kept, it would keep the best alone,
    and a run could not go on from the newest."""
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit


def warn_of_the_training_before(args: DevFTConfig) -> None:
    """Say what another training that begins anew in the same folder leaves there."""
    if args.process_index == 0 and (left := list(_rounds_by_folder(Path(args.output_dir)))):
        names = ", ".join(Path(each).name for each in left)
        logger.warning(
            f"{args.output_dir} has {names} of the training before, which `last` may go on from: delete them, or give "
            "a new trainer another `output_dir`."
        )


def _newest(folder: Path) -> str | None:
    """The newest checkpoint of a run that one can go on from, or its newest stage, if that has more rounds."""
    rounds = _rounds_by_folder(folder)
    return max(rounds, key=rounds.__getitem__, default=None)  # of equals the checkpoint


def _rounds_by_folder(folder: Path) -> dict[str, int]:
    """What a run in a folder can go on from, and after how many rounds: checkpoints, then finished stages."""
    checkpoints = [
        path for path in sort_checkpoints(str(folder), use_mtime=False) if (Path(path) / RUN_STATE).exists()
    ]
    stages = [str(folder / f"stage-{stage}") for stage in finished_stages(folder)]
    return {path: _round_of(path) for path in checkpoints} | {path: _rounds_done(path) for path in stages}


def _rounds_done(stage: str) -> int:
    """Of the run, at a stage's end or a checkpoint's; 0 where its folder does not tell."""
    try:
        return TrainerState.load_from_json(f"{stage}/{TRAINER_STATE_NAME}").global_step
    except (OSError, ValueError, TypeError):
        return 0


def download_last_stage(args: DevFTConfig) -> str:
    """Download the newest stage in `args.resume_from_hub`, of the same commit on all processes; returns the local
    folder.

    Raises:
        ValueError: the repository cannot be read.
    """
    assert args.resume_from_hub is not None
    commit = None
    if args.process_index == 0:  # another run may push meanwhile
        commit = newest_commit(args.resume_from_hub, args.hub_revision, args.hub_token)
    commit = broadcast_object_list([commit])[0]
    with args.main_process_first(desc="download of the last stage"):
        return download_stage(
            args.resume_from_hub, commit, args.hub_token, healed=bool(args.healing_steps) or args.fusion == "bridge"
        )


def repository(args: DevFTConfig) -> str:
    """Name the repository that a run pushes to: as given, or as its output folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def make_pusher(args: DevFTConfig, token: str | None, revision: str | None, private: bool | None) -> HubPusher:
    """Make what commits to the run's repository; arguments that are None are those of the config."""
    return HubPusher(
        repository(args),
        HfApi(token=args.hub_token if token is None else token),
        args.hub_private_repo if private is None else private,
        revision or args.hub_revision,
    )


def best_checkpoint(state: TrainerState, run_dir: Path, written: Path | None = None) -> str | None:
    """Find the best round's checkpoint: in the folder where the run is now, in which `written` is about to be; else
    where it was."""
    best = run_dir / f"checkpoint-{state.best_global_step}"
    is_there = state.best_global_step and (best == written or best.exists())
    return str(best) if is_there else state.best_model_checkpoint


def rotate(run_dir: Path, args: DevFTConfig, state: TrainerState) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, but neither the newest nor the best.

    Not by transformers' `rotate_checkpoints`: of a checkpoint whose deletion was cut short it would take what is left
    for the newest.
    """
    limit = args.save_total_limit or 0
    # By round, as clocks jump; those of rounds to come are from before the run was taken up again, and the oldest.
    found = sort_checkpoints(str(run_dir), use_mtime=False)
    found.sort(key=lambda path: _round_of(path) <= state.global_step)
    protected = {*found[-1:], str(state.best_model_checkpoint)}.intersection(found)
    surplus = len(found) - max(limit, len(protected)) if limit > 0 else 0
    oldest = [Path(path) for path in found if path not in protected][: max(0, surplus)]
    delete_folders(oldest, leftovers=list(run_dir.glob(".checkpoint-*.old")))


def _round_of(path: str) -> int:
    return int(path.rpartition("-")[2])
