"""Where a run goes on from, and where it pushes to."""

from pathlib import Path

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from hf_devft.configuration import DevFTConfig
from hf_devft.hub.download import download_stage, newest_commit
from hf_devft.hub.push import HubPusher
from hf_devft.run.files import delete_folders


def starting_point(args: DevFTConfig, resume_from_checkpoint: str | bool | None) -> str | bool | None:
    """Find where a run goes on: as given, or the newest checkpoint ("last"), or the newest stage on the Hub.

    Returns:
        What `Trainer.train` takes.

    Raises:
        ValueError: the repository cannot be read.
    """
    if resume_from_checkpoint == "last":
        folder = Path(args.output_dir)
        resume_from_checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if not resume_from_checkpoint and args.resume_from_hub:
        return download_last_stage(args)
    return resume_from_checkpoint


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


def rotate(run_dir: Path, args: DevFTConfig, state: TrainerState) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, but neither the newest nor the best.

    Not by transformers' `rotate_checkpoints`: of a checkpoint whose deletion was cut short it would take what is left
    for the newest.
    """
    limit = args.save_total_limit or 0
    found = sort_checkpoints(str(run_dir), use_mtime=True)
    protected = {*found[-1:], str(state.best_model_checkpoint)}.intersection(found)
    surplus = len(found) - max(limit, len(protected)) if limit > 0 else 0
    oldest = [Path(path) for path in found if path not in protected][: max(0, surplus)]
    delete_folders(oldest, leftovers=list(run_dir.glob(".checkpoint-*.old")))
