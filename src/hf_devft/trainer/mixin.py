"""`DevFTMixin`: stages -> rounds -> artifacts on top of any `Trainer` subclass, and nothing below that."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollator, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import align_special_tokens

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.federation.ledger import Ledger
from hf_devft.federation.partition import ClientData
from hf_devft.federation.sampling import Placement
from hf_devft.hub.publisher import RunPublisher, push_all, submit_all, waiting_for_pushes
from hf_devft.hub.push import finished_stages
from hf_devft.models.adapter import adapter_state
from hf_devft.models.weights import is_stored
from hf_devft.run.checkpoint import Checkpoint
from hf_devft.run.claim import claim, goes_on_in
from hf_devft.run.progress import leaving_bars, show_rounds
from hf_devft.tasks import answers_prompts
from hf_devft.trainer.evaluation import (
    each_batch_alone,
    early_stopping_waits,
    evaluate_full_depth,
    over_the_sets,
    submodel_metrics,
)
from hf_devft.trainer.interface import ClientLink
from hf_devft.trainer.model_in_use import ModelInUse
from hf_devft.trainer.preparation import (
    check_batch_size,
    check_run,
    check_trainer,
    clients_and_evaluation,
    prepare_run,
    settle_arguments,
)
from hf_devft.trainer.resuming import (
    keeping_the_newest,
    make_pusher,
    repository,
    rotate,
    starting_point,
    stops_unsaved,
    warn_of_the_training_before,
)
from hf_devft.trainer.session import TrainingSession


if TYPE_CHECKING:  # what it is mixed into
    from transformers import Trainer as Base
else:
    Base = object


logger = logging.getLogger(__name__)
_WITH_TOKENS = (PreTrainedTokenizerBase, ProcessorMixin)  # whose special tokens `Trainer` aligns


class DevFTMixin(Base):
    """Federated rounds in developmental stages, for a `Trainer` subclass that ends its `__init__` with a LoRA model.

        class DevFTSFTTrainer(DevFTMixin, SFTTrainer): ...

    The step is a round, the epoch a stage (see `DevFTConfig`). Evaluation between rounds measures the stage's submodel
    (`eval_*`); at a stage's end the transferred adapter is also measured on the full model (`eval_full_*`). A callback
    that asks to stop during an evaluation (`EarlyStoppingCallback`) ends the running stage, at any other time the run.
    The best metric is tracked within each stage, and with `load_best_model_at_end` each stage hands on its best
    checkpointed round.

    Args:
        train_dataset: one dataset to partition as `args` says, or {client: dataset}.
        partitioner: any object with flwr-datasets' `Partitioner` interface, instead of `args.partition`.
        calibration_dataset: the server's own rows, in the form of `eval_dataset`, for `args.healing_steps`,
            `args.distillation_steps`, `fusion="bridge"` and `grouping="calibrated"` (whose default is `eval_dataset`).
        initialisation: the second value of `prepare_peft_config`, where the adapter was made by the first.
        remote_clients: the way to clients on other machines, see `hf_devft.network`; default: they are trained here.

    Attributes:
        clients: who has which rows of `train_dataset`.
        run: where the run stands; also as `stages`, the records of all of them, and `ledger`, what rounds have cost.
        models: the model in use, and the base.

    Raises:
        ValueError: data, adapter or options that cannot be trained this way; before any work is spent.
    """

    args: DevFTConfig
    model: PeftModel
    kind = "devft"  # as `check_compatibility` knows it
    publisher: RunPublisher | None = None  # on the main process, with `push_to_hub`
    given_model: PeftModel | None = None  # with an adapter of its own, which will have what was trained

    def __init__(
        self,
        model: Any = None,
        args: DevFTConfig | None = None,
        *,
        train_dataset: Dataset | dict[str, Dataset] | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        partitioner: Any = None,
        calibration_dataset: Dataset | None = None,
        initialisation: str | None = None,
        remote_clients: ClientLink | None = None,
        **kwargs,
    ):
        settle_arguments(args, kwargs)
        self.given_model = model if isinstance(model, PeftModel) else None
        self.clients, eval_dataset = clients_and_evaluation(args, train_dataset, eval_dataset, partitioner)
        super().__init__(
            model=model, args=args, train_dataset=self.clients.dataset, eval_dataset=eval_dataset, **kwargs
        )
        self.clients = self.remap_client_rows(self.clients)
        if not answers_prompts(args.task):
            # Most of these models take `num_items_in_batch` and ignore it: their losses are means over the batch.
            self.model_accepts_loss_kwargs = False
        self.placement = Placement(args.client_placement, args.process_index, args.world_size)
        self.calibration_dataset, self.remote_clients = calibration_dataset, remote_clients
        setup = check_trainer(self, initialisation)
        self.run, patched = prepare_run(self.model, setup.adapter, args, self.clients)
        self.models = ModelInUse(self, patched)
        check_run(self, self.run, setup)
        self._session: TrainingSession | None = None
        self._checkpoint: Checkpoint | None = None
        show_rounds(self, self.stages, lambda: self.run.client_losses)

    @property
    def stages(self) -> list[StageConfig]:
        """The records of all stages."""
        return self.run.stages

    @property
    def peft_config(self) -> PeftConfig:
        """By which PEFT makes the full-depth adapter."""
        return self.run.adapter.config

    @property
    def ledger(self) -> Ledger:
        """What the rounds so far have cost."""
        return self.run.ledger

    # --- what a trainer that prepares its data or model may override -----------------------------------------

    def remap_client_rows(self, clients: ClientData) -> ClientData:
        """Return the clients' rows as they are in what the trainer has made of their dataset."""
        if len(self.train_dataset) != len(clients.dataset):
            raise ValueError(
                f"the trainer made {len(self.train_dataset)} rows of the clients' {len(clients.dataset)}, so it is "
                "not known whose they are: turn off packing and filtering."
            )
        return clients

    def prepare_model_in_use(self, model: PeftModel) -> None:
        """Prepare every submodel, and the full model, in place, before it is trained or evaluated; does nothing
        here."""

    # --- the loop: stages, rounds ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; also goes on with the stage after a finished one, whose folder is given, and, with
        `args.resume_from_hub` and no checkpoint, after the last one that was pushed there.

        Args:
            resume_from_checkpoint: "last" is the newest checkpoint in `output_dir`, or the start where there is none.
        """
        folder = starting_point(self.args, resume_from_checkpoint)
        self._checkpoint = self.run.load(folder) if folder else None
        if folder is None and self._session is not None:
            warn_of_the_training_before(self.args)
        is_new = self._session is None and not goes_on_in(self.args.output_dir, folder)
        with claim(self.args, is_new), leaving_bars(self), waiting_for_pushes(self.publisher):
            return super().train(resume_from_checkpoint=folder, **kwargs)

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        """Run `Trainer`'s loop, with rounds for steps and stages for epochs."""
        checkpoint = self._begin_training(batch_size, resume_from_checkpoint, trial)
        session, start_time = self._session, time.time()
        log_how = (trial, ignore_keys_for_eval, start_time)
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if args.eval_on_start and checkpoint is None:
            self.models.use_whole(self.run)
            known = self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
            self.run.start_metrics = evaluate_full_depth(self, 0, known, ignore_keys_for_eval)
        for record in self.stages[checkpoint.run.stage - 1 if checkpoint else 0 :]:
            if self.control.should_training_stop and not (checkpoint and checkpoint.run.within):
                if checkpoint is not None:
                    self.models.release()  # which has not its adapter yet
                break
            active = self.run.active = session.enter(record, checkpoint)
            checkpoint = None
            self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
            self.control.should_epoch_stop |= active.is_over
            while active.done < record.rounds:
                if self.control.should_epoch_stop or self.control.should_training_stop:
                    break
                self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
                learning_rate = session.schedule.rate(record.learning_rate)
                outcome = session.run_round(active, learning_rate)
                unlogged = self.state.global_step - self._globalstep_last_logged
                self._tr_loss += _known_loss(args, outcome.loss, self._tr_loss, unlogged)
                self.state.num_input_tokens_seen += outcome.seen
                session.schedule.step()
                active.done += 1
                self.state.global_step += 1
                session.seed_round()
                self.state.epoch = record.stage - 1 + active.done / record.rounds
                self.control = self.callback_handler.on_step_end(args, self.state, self.control)
                self._log_save_evaluate(outcome.grad_norm if args.max_grad_norm > 0 else None, learning_rate, *log_how)
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            is_saved = active.done == record.rounds or session.saved_round == self.state.global_step
            self.control.should_save |= stops_unsaved(args, self.control, is_saved)
            self._log_save_evaluate(None, session.schedule.rate(record.learning_rate), *log_how)
            session.clients.end_stage()
            session.finish(active, ignore_keys_for_eval)
            active = None  # what it held is not needed to make the next one
        self.models.use_whole(self.run)
        self.models.hand_back(self.run)
        if args.should_save and args.save_strategy != "no":
            # A run that was killed between its last save and the rotation has left one more than it keeps.
            rotate(Path(self._get_output_dir(trial=trial)), args, self.state)
        num_samples = self.run.num_rounds * args.clients_per_round * args.local_steps * args.train_batch_size
        with keeping_the_newest(args):
            return self._finalize_training(trial, num_samples * args.gradient_accumulation_steps, start_time)

    def _begin_training(self, batch_size: int, resume_from_checkpoint: str | None, trial: Any) -> Checkpoint | None:
        """Make the run's state that of its start, or of the checkpoint that it goes on from."""
        args, run = self.args, self.run
        check_batch_size(batch_size, self._train_batch_size)
        checkpoint, self._checkpoint = self._checkpoint, None
        run.check_start(checkpoint)
        run.healed.delete()
        if self.models.base is not None:
            if isinstance(self.processing_class, _WITH_TOKENS):  # `Trainer` has done so for `evaluate`'s copy
                align_special_tokens(self.models.base, self.processing_class)
            run.federation = run.active = None
            self.models.use_whole(run)  # where a run was interrupted
        run.begin(adapter_state(self.model), checkpoint)
        self._init_training_state(run.num_rounds, run.num_rounds, len(self.stages), resume_from_checkpoint, trial)
        self.state.compute_steps(args, run.num_rounds)  # as the config has them now
        self._session = TrainingSession(self, run, self.models, checkpoint)
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._tr_loss, self._total_loss_scalar = torch.zeros((), device=args.device), 0.0
        self._session.seed_round()
        return checkpoint

    def _log_save_evaluate(self, grad_norm, learning_rate, trial, ignore_keys, start_time) -> None:
        asked = self.control.should_save and self.control.should_evaluate and self.args.save_strategy == "best"
        self._maybe_log_save_evaluate(
            self._tr_loss, grad_norm, self.model, trial, self.state.epoch, ignore_keys, start_time, learning_rate
        )
        if asked and self.state.best_global_step != self.state.global_step:  # a signal has, and the evaluation not
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    # --- evaluation -----------------------------------------------------------------------------------------

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """As `Trainer`'s; a stop that it brings about ends the stage, and the run only in the last one."""
        stopping = self.control.should_training_stop
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if self.control.should_training_stop and not stopping:
            self.control.should_training_stop = False
            self.control.should_epoch_stop = True
        self._session.peak_memory.release()
        return metrics

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As `Trainer`'s; of several sets also their mean and the worst, by which alone training may stop early."""
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(sets, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with early_stopping_waits(self.callback_handler):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics |= over_the_sets(metrics, metric_key_prefix, sets)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        """As `Trainer`'s, of rounds that are saved; the stage's record has the metrics of the one it will hand on."""
        counts = self.control.should_save or self.args.save_strategy == "best" or not self.args.load_best_model_at_end
        is_new_best = counts and super()._determine_best_metric(metrics, trial)
        if self.run.active is not None and (is_new_best or self._session.hands_on_newest):
            self.run.active.record.metrics = submodel_metrics(metrics, self.eval_dataset)
        return is_new_best

    def evaluation_loop(self, *args, **kwargs):
        """As `Trainer`'s, but a batch's loss never depends on what other processes evaluate at the time."""
        if self.run.active is None:
            self.models.use_whole(self.run)
        with each_batch_alone(self.args), self.models.evaluating(kwargs.get("prediction_loss_only")):
            return super().evaluation_loop(*args, **kwargs)

    # --- logs and files -------------------------------------------------------------------------------------

    def store_flos(self) -> None:
        """`total_flos` is the ledger's count."""
        self.state.total_flos = self.ledger.flops

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the running stage and what was spent so far; see `FederatedRun.annotated`."""
        super().log(self.run.annotated(logs), start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the full-depth adapter, and within a stage also the submodel's as it travels."""
        folder = Path(output_dir or self.args.output_dir)
        between = self.models.base is not None and (not self.models.is_whole or self.run.residual)
        is_own = self.run.active is not None or between
        state = None if is_own else adapter_state(self.model)  # on all processes, which may have parts of it
        if self.args.should_save:
            self.run.save_adapters(folder, state)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_checkpoint(self, model, trial) -> None:
        """As `Trainer`'s, in one move."""
        self._session.save_checkpoint(Path(self._get_output_dir(trial=trial)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing: `train` has read and checked it, and the stage it stopped in takes it up."""

    def _load_best_model(self) -> None:
        """Nothing at the end of training: each stage has already taken up its best round."""

    # --- the Hub --------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Settle where to push. The repository is made by the first push, so that no run waits or dies for the Hub."""
        args = self.args
        self.hub_model_id = repository(args)
        if self.is_world_process_zero():
            pusher = make_pusher(args, token, None, private)
            self.publisher = RunPublisher(pusher, args.output_dir, args.hub_strategy, args.hub_always_push)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """Push each finished stage that is not there, as a commit and a tag; where none is, the adapter as it is.

        Args:
            commit_message: where there is no stage; a stage's commit has its name.
            blocking: wait for it, and raise what goes wrong; else push beside what comes next, as training does.
            token, revision, private: instead of `hub_token`, `hub_revision`, `hub_private_repo`.
            card: what `Trainer` would put into a card; of no use here, see `create_model_card`.

        Returns:
            The last commit; None where all was there, on other processes than the main one, and if not waited for.
        """
        if card:
            self.create_model_card(**card)
        if not finished_stages(self.args.output_dir):
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        is_own = self.publisher is not None and (token, revision, private) == (None, None, None)
        pusher = self.publisher.pusher if is_own else make_pusher(self.args, token, revision, private)
        push = push_all if blocking else submit_all
        return push(pusher, Path(self.args.output_dir), commit_message or "Adapter")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing but a warning: a stage's card is written when it is over, with what `card_*` of the config say."""
        logger.warning(
            "the run has written its cards: set `card_license`, `card_language`, `card_datasets` before it."
        )

    def _finish_current_push(self) -> None:
        if self.publisher is not None and self.args.push_to_hub:
            self.publisher.finish()

    # --- what the parts are given ---------------------------------------------------------------------------

    def client_rows(self) -> tuple[Dataset, DataCollator]:
        """Return the clients' rows in columns that the collator takes, and the collator."""
        dataset, collator = self.train_dataset, self.data_collator
        if isinstance(dataset, Dataset):
            return self._remove_unused_columns(dataset, description="Training"), collator
        return dataset, self._get_collator_with_removed_columns(collator, description="Training")

    def server_batches(self, rows: Dataset, size: int, sampler: Sampler | None = None) -> Iterator[dict[str, Any]]:
        """Make batches of the server's own rows, on the device."""
        rows = self._remove_unused_columns(rows, description="The server's texts")
        return map(self._prepare_inputs, DataLoader(rows, size, sampler=sampler, collate_fn=self.data_collator))

    def leaving_logits_out(self) -> contextlib.AbstractContextManager:
        """Return a context in which models leave out logits that the loss does not need."""
        return self.models.leaving_logits_out()

    def clip_gradients(self, module: nn.Module) -> torch.Tensor | float | None:
        """Clip a module's gradients to `max_grad_norm`; returns their norm before."""
        return self._clip_grad_norm(module)

    def _move_model_to_device(self, model, device) -> None:
        """As `Trainer`'s, but for layers that are still in the checkpoint."""
        if not any(map(is_stored, model.parameters())):
            return super()._move_model_to_device(model, device)
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)


def _known_loss(args: DevFTConfig, loss: float, so_far: torch.Tensor, rounds: int) -> torch.Tensor | float:
    """A round's loss; where it has none, the mean of those that were not logged yet, as `Trainer` has it."""
    return loss if np.isfinite(loss) or not args.logging_nan_inf_filter else so_far / max(1, rounds)
