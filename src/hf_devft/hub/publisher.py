"""What of a run goes to the Hub, and when: `Trainer`'s Hub options, for stages."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy

from hf_devft.files import link_or_copy
from hf_devft.hub.push import HubPusher, Push, finished_stages, left_over, push_stages, stage_push


logger = logging.getLogger(__name__)


# Begins the names of copies that are being pushed, after which comes the process.
_COPY = ".push-"


def left_copies(output_dir: Path) -> list[Path]:
    """List copies that were being pushed when another process was killed."""
    own = f"{_COPY}{os.getpid()}-"
    return [path for path in output_dir.glob(f"{_COPY}*") if not path.name.startswith(own)]


class RunPublisher:
    """Pushes a run's stages and checkpoints beside the training.

    Args:
        pusher: commits, in order.
        output_dir: of the run.
        strategy: each stage when it is finished, or all at the end ("end"); with "checkpoint" the newest checkpoint,
            too, as `last-checkpoint/`, with "all_checkpoints" every one.
        always: push a checkpoint also while the one before is under way.
    """

    def __init__(self, pusher: HubPusher, output_dir: str | Path, strategy: HubStrategy, always: bool):
        self.pusher, self.output_dir = pusher, Path(output_dir)
        self._strategy, self._always = strategy, always

    @property
    def pushes_each_stage(self) -> bool:
        """Whether a stage is pushed when it is finished."""
        return self._strategy != HubStrategy.END

    def submit_stage(self, stage: int) -> None:
        """Push a finished stage beside what comes next."""
        self.pusher.submit(stage_push(self.output_dir, stage))

    def catch_up(self, stage: int) -> None:
        """Push what a run that goes on in `stage` had not pushed of those before when it was stopped, beside what
        comes next."""
        before = [each for each in range(1, stage) if (self.output_dir / f"stage-{each}").is_dir()]
        if self.pushes_each_stage:
            self.pusher.catch_up([stage_push(self.output_dir, each) for each in before])

    def submit_checkpoint(self, folder: Path, round_number: int) -> None:
        """Push a checkpoint beside what comes next, where the strategy asks for it."""
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        name = names.get(self._strategy)
        if name is None or (self.pusher.pending and not self._always):
            return
        try:  # linked, so that the checkpoint can be rotated away while it is pushed
            copy = tempfile.TemporaryDirectory(prefix=f"{_COPY}{os.getpid()}-", dir=self.output_dir)
            shutil.copytree(folder, copy.name, copy_function=link_or_copy, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            logger.warning(f"{folder} is not pushed, as it cannot be copied: {error}")
            return
        self.pusher.submit(Push(f"Round {round_number}, checkpoint", {name: Path(copy.name)}, keep=copy))

    def finish(self) -> None:
        """As `wait`, with all stages where they are pushed at the end."""
        if not self.pushes_each_stage:
            submit_all(self.pusher, self.output_dir, "Adapter")
        self.wait()

    def wait(self) -> None:
        """Wait for what is under way; a warning says what could not be pushed, and how to."""
        if self.pusher.finish():
            logger.warning(left_over(self.pusher, self.output_dir))


@contextmanager
def waiting_for_pushes(publisher: RunPublisher | None) -> Iterator[None]:
    """Where what is done within this context breaks off, what was on its way to the Hub is waited for."""
    try:
        yield
    except BaseException:
        if publisher is not None:
            publisher.wait()
        raise


def submit_all(pusher: HubPusher, output_dir: Path, title: str) -> None:
    """Push every finished stage beside what comes next; where there is none, the adapter as it is."""
    for push in [stage_push(output_dir, stage) for stage in finished_stages(output_dir)] or [
        _adapter(output_dir, title)
    ]:
        pusher.submit(push)


def push_all(pusher: HubPusher, output_dir: Path, title: str) -> CommitInfo | None:
    """Push every finished stage that is not there yet, at once; where there is none, the adapter as it is.

    Returns:
        The last commit; None where all was there.

    Raises:
        HfHubHTTPError, OSError: as `huggingface_hub` says.
    """
    pusher.finish()  # what training has pushed comes first
    if not finished_stages(output_dir):
        return pusher.push(_adapter(output_dir, title))
    return next(reversed(push_stages(pusher, output_dir)), None)


def _adapter(output_dir: Path, title: str) -> Push:
    return Push(title, {"": output_dir})
