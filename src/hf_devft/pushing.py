"""`PushMixin`: `Trainer`'s Hub options, for stages."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy

from hf_devft.hub.push import HubPusher, Push, finished_stages, left_over, push_stages, stage_push


logger = logging.getLogger(__name__)


class PushMixin:
    """How a `DevFTMixin` pushes: each finished stage when it is finished, or all at the end (`hub_strategy="end"`)."""

    _pusher: HubPusher | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Settle where to push. The repository is made by the first push, so that no run waits or dies for the Hub."""
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        if self.is_world_process_zero():
            self._pusher = self._make_pusher(token, None, private)

    def _make_pusher(self, token: str | None, revision: str | None, private: bool | None) -> HubPusher:
        args = self.args
        return HubPusher(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            HfApi(token=args.hub_token if token is None else token),
            args.hub_private_repo if private is None else private,
            revision or args.hub_revision,
        )

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        """Push every finished stage, each as a commit and a tag; where there is none, the adapter as it is.

        A stage that is there already is not pushed again.

        Args:
            commit_message: where there is no stage; a stage's commit has its name.
            blocking: wait for it, and raise what goes wrong; else push beside what comes next, as training does.
            token, revision, private: instead of `hub_token`, `hub_revision`, `hub_private_repo`.

        Returns:
            The last commit; None where all was there, on other processes than the main one, and if not waited for.
        """
        output_dir = self.args.output_dir
        finished = finished_stages(output_dir)
        if not finished:
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        pusher = self._pusher
        if pusher is None or (token, revision, private) != (None, None, None):
            pusher = self._make_pusher(token, revision, private)
        adapter = Push(commit_message or "Adapter", {"": Path(output_dir)})
        if not blocking:
            for push in [stage_push(output_dir, stage) for stage in finished] or [adapter]:
                pusher.submit(push)
            return None
        pusher.finish()  # what training has pushed comes first
        if not finished:
            return pusher.push(adapter)
        return next(reversed(push_stages(pusher, output_dir)), None)

    def _push_stage(self, stage: int) -> None:
        """A finished stage, beside the next one's training."""
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self._pusher.submit(stage_push(self.args.output_dir, stage))

    def _push_from_checkpoint(self, checkpoint_folder: Path) -> None:
        """With `hub_strategy` "checkpoint" the newest one, as `last-checkpoint/`; with "all_checkpoints" every one."""
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint_folder.name}
        name = names.get(self.args.hub_strategy)
        if self._pusher is None or not self.args.push_to_hub or name is None:
            return
        if self._pusher.pending and not self.args.hub_always_push:
            return  # as `Trainer`: not while the push before is under way
        # Linked, so that the checkpoint can be rotated away while it is pushed.
        copy = tempfile.TemporaryDirectory(prefix=".push-", dir=self.args.output_dir)
        shutil.copytree(checkpoint_folder, copy.name, copy_function=os.link, dirs_exist_ok=True)
        self._pusher.submit(Push(f"Round {self.state.global_step}, checkpoint", {name: Path(copy.name)}, keep=copy))

    def _finish_current_push(self) -> None:
        if not self.args.push_to_hub or self._pusher is None:
            return
        if self.args.hub_strategy == HubStrategy.END:
            self.push_to_hub(blocking=False)
        if self._pusher.finish():
            logger.warning(left_over(self._pusher, self.args.output_dir))
