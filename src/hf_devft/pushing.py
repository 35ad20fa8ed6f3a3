"""`PushMixin`: `Trainer`'s Hub options, for stages."""

import logging
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy

from hf_devft.hub.push import HubPusher, Push, finished_stages, left_over, stage_push


logger = logging.getLogger(__name__)


class PushMixin:
    """How a `DevFTMixin` pushes: each finished stage when it is finished, or all at the end (`hub_strategy="end"`)."""

    _pusher: HubPusher | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Settle where to push. The repository is made by the first push, so that no run waits or dies for the Hub."""
        args = self.args
        self.hub_model_id = args.hub_model_id or Path(args.output_dir).absolute().name
        if self.is_world_process_zero():
            api = HfApi(token=args.hub_token if token is None else token)
            private = args.hub_private_repo if private is None else private
            self._pusher = HubPusher(self.hub_model_id, api, private, args.hub_revision)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        """Push every finished stage, each as a commit and a tag; where there is none, the adapter as it is.

        Args:
            commit_message: default: the stage's name.
            blocking: wait for it, and raise what goes wrong; else push beside what comes next, as training does.
            token, revision, private: instead of `hub_token`, `hub_revision`, `hub_private_repo`.

        Returns:
            The last commit; None on other processes than the main one, and where it is not waited for.
        """
        finished = finished_stages(self.args.output_dir)
        if not finished:
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self._pusher is None or (token, revision, private) != (None, None, None):
            self.init_hf_repo(token, private)
            self._pusher.revision = revision or self.args.hub_revision
        pushes = [stage_push(self.args.output_dir, stage) for stage in finished]
        pushes = pushes or [Push("Adapter", {"": Path(self.args.output_dir)})]
        commit = None
        for push in pushes:
            push = replace(push, title=commit_message or push.title)
            if blocking:
                commit = self._pusher.push(push)
            else:
                self._pusher.submit(push)
        return commit

    def _push_stage(self, stage: int) -> None:
        """A finished stage, beside the next one's training."""
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self._pusher.submit(stage_push(self.args.output_dir, stage))

    def _push_from_checkpoint(self, checkpoint_folder: Path) -> None:
        """With `hub_strategy` "checkpoint" the newest one, as `last-checkpoint/`; with "all_checkpoints" every one."""
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint_folder.name}
        name = names.get(self.args.hub_strategy)
        if not self.args.push_to_hub or name is None or (self._pusher.pending and not self.args.hub_always_push):
            return  # as `Trainer`: not while the push before is under way
        self._pusher.submit(Push(f"Round {self.state.global_step}, checkpoint", {name: checkpoint_folder}))

    def _finish_current_push(self) -> None:
        if not self.args.push_to_hub or self._pusher is None:
            return
        if self.args.hub_strategy == HubStrategy.END:
            self.push_to_hub(blocking=False)
        if self._pusher.finish():
            logger.warning(left_over(self._pusher, self.args.output_dir))
