"""One call of `train`: what lives from its start to its end, and how stages and rounds are run with it."""

import functools
import gc
import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hf_devft.configuration import StageConfig
from hf_devft.configuration.stage_folder import SUBMODEL
from hf_devft.federation.batches import ClientBatches, client_loader
from hf_devft.federation.client_side import ClientSide
from hf_devft.federation.clients.local_training import LocalTraining, next_step
from hf_devft.federation.heterogeneity.resources import expected_flops
from hf_devft.federation.privacy import RecordPrivacy, read_secret
from hf_devft.federation.processes import add_up
from hf_devft.federation.rounds import RoundOutcome
from hf_devft.federation.sampling import client_seed, local_trainings
from hf_devft.files import atomic_folder, naming, note_checksum, write_json
from hf_devft.models.adapter import chooses_layers
from hf_devft.models.flops import flops_per_token
from hf_devft.models.layout import State
from hf_devft.run.checkpoint import SCHEDULE, Checkpoint, is_of_run, save_federation
from hf_devft.run.claim import goes_on_in
from hf_devft.run.client_batches import make_sampler
from hf_devft.run.peak_memory import PeakMemory
from hf_devft.run.report import RunReport, describe_setup, table_rows
from hf_devft.run.tables import GrowingTable
from hf_devft.stages.builder import SubmodelBuilder
from hf_devft.tasks.data import first_rows
from hf_devft.trainer.active_stage import ActiveStage
from hf_devft.trainer.calibration import CalibrationLoss
from hf_devft.trainer.client_batching import ClientBatching
from hf_devft.trainer.evaluation import each_batch_alone, evaluate_full_depth, named_sets, number_of_rows
from hf_devft.trainer.federated_run import FederatedRun
from hf_devft.trainer.federation_builder import build_federation, gradient_obstacle
from hf_devft.trainer.interface import ClientLink, FederatedTrainer
from hf_devft.trainer.local_clients import LocalClients
from hf_devft.trainer.model_in_use import ModelInUse
from hf_devft.trainer.overrides import warn_of_silent_events
from hf_devft.trainer.recomputation import Recomputation
from hf_devft.trainer.resuming import best_checkpoint, rotate
from hf_devft.trainer.schedule import RoundSchedule
from hf_devft.trainer.server_teacher import ServerTeacher
from hf_devft.trainer.stage_factory import StageFactory
from hf_devft.trainer.stage_runner import StageRunner


logger = logging.getLogger(__name__)


class TrainingSession:
    """Runs a trainer's stages and rounds.

    Args:
        trainer: whose `state` is that of the start, or of the checkpoint.
        run: where the run stands. models: the model in use.
        checkpoint: what the run goes on from, or None.

    Attributes:
        schedule: of the learning rate. peak_memory: of the work under way.
        clients: carries messages to the clients and back.
        saved_round: after which the newest checkpoint was written.
    """

    def __init__(
        self, trainer: FederatedTrainer, run: FederatedRun, models: ModelInUse, checkpoint: Checkpoint | None
    ):
        args = trainer.args
        self.trainer, self.run, self.models = trainer, run, models
        self.saved_round = None if checkpoint is None else trainer.state.global_step
        secret = self._secret(checkpoint)
        self.federation = run.federation = build_federation(trainer, checkpoint, run.accountant, secret)
        self._privacy = None if run.accountant is None or not args.protects_records else RecordPrivacy(
            run.accountant.noise_multiplier, args.dp_clipping_norm, args.train_batch_size, secret,
            trainer.clients.examples,
        )  # fmt: skip
        with naming(checkpoint.folder if checkpoint else ""):
            state = checkpoint.schedule if checkpoint else None
            self.schedule = RoundSchedule(trainer, run.num_rounds, trainer.state.global_step, state)
        self.peak_memory = PeakMemory(args.device)
        self._table = GrowingTable()
        if checkpoint is not None:
            self._take_up(checkpoint)
        warn_of_silent_events(trainer.callback_handler.callbacks)
        self._local_training = LocalTraining(trainer, trainer.placement.shares_batches)
        most = len(trainer.placement.clients(range(args.clients_per_round)))
        self._batching = ClientBatching(trainer, most, gradient_obstacle(args, self.federation))
        self._factory: StageFactory | None = None
        method, correction, wire = self.federation.method, self.federation.correction, self.federation.wire
        self.clients: ClientLink = trainer.remote_clients or LocalClients(
            ClientSide(method, correction, wire), self.runner, self.batches_of
        )
        self.clients.begin_run(run, self.federation, trainer.processing_class)
        if checkpoint is not None:
            self._keep_states(checkpoint.folder)

    def _secret(self, checkpoint: Checkpoint | None) -> int:
        """What a private run's clients and noise are drawn by, the same on all processes; 0 in other runs."""
        if self.run.accountant is None:
            return 0
        folder, found = Path(self.trainer.args.output_dir), None
        if self.trainer.args.process_index == 0:
            is_new = not goes_on_in(folder, checkpoint and checkpoint.folder)
            try:
                found = read_secret(folder, self.run.clients.digest(), is_new)
            except ValueError as error:  # which all processes raise
                found = error
        if isinstance(found := broadcast_object_list([found])[0], ValueError):
            raise found
        return found

    def seed_round(self) -> None:
        """Make whatever is drawn between rounds the same on all processes, and in a resumed run."""
        index, nobody = self.trainer.state.global_step, len(self.run.clients.rows)
        set_seed(client_seed(self.trainer.args.seed, index, nobody))

    def autocast(self) -> AbstractContextManager:
        """Return a context of the precision of training, for a model that no engine has prepared."""
        is_half = self.trainer.accelerator.mixed_precision == "bf16"
        return torch.autocast(self.trainer.args.device.type, torch.bfloat16, enabled=is_half)

    # --- into a stage ---------------------------------------------------------------------------------------

    def enter(self, record: StageConfig, checkpoint: Checkpoint | None) -> ActiveStage:
        """Enter a stage: full model and adapter -> submodel and its adapter, ready to train. Goes on where a
        checkpoint has left it."""
        started, trainer, run = time.perf_counter(), self.trainer, self.run
        self.peak_memory.release()
        self.peak_memory.reset()
        factory = self.stage_factory(self.models.release())
        goes_on = checkpoint is not None and checkpoint.sub is not None
        sub = checkpoint.sub if goes_on else self._begin_anew(record, factory)
        with naming(checkpoint.folder if checkpoint else ""):
            active = factory.enter(
                record,
                run.adapter,
                sub,
                distil=bool(trainer.args.distillation_steps) and record.stage > 1 and not goes_on,
                patched=self.federation.method.modifies_base_weights,
            )
        self.models.use(active.engine)
        if checkpoint is not None:
            active.done, active.is_over = checkpoint.run.done, checkpoint.run.stage_over
        took = time.perf_counter() - started
        record.totals["setup_seconds"] = record.totals.get("setup_seconds", 0.0) + took  # in a run that goes on, too
        active.setup = {
            "setup_seconds": record.totals["setup_seconds"],
            "setup_peak_memory": 0
            if run.accountant
            else self.peak_memory.read(),  # in a private run it tells of clients
            "setup_flops": record.totals.get("setup_flops", 0.0),
            "base_bytes": active.base_bytes,
        }
        self._begin_rounds(active)
        gc.collect()  # the models that it took to come here
        self.peak_memory.release()
        return active

    def _begin_anew(self, record: StageConfig, factory: StageFactory) -> State:
        """Group a stage's layers, noting it in its record, and fuse by the groups what is remembered and the
        full-depth adapter; returns the submodel's."""
        record.totals, record.metrics = {}, {}
        adapter = self.run.adapter
        record.groups = factory.group(record, adapter.state)
        rule = record.adapter_rule
        self.federation.memory.carry(lambda name, state: replace(adapter, state=state).fuse(*rule))
        state = self.trainer.state
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self.schedule.begin_stage()
        return adapter.fuse(*rule)

    def _begin_rounds(self, active: ActiveStage) -> None:
        state, record = self.trainer.state, active.record
        begin = state.global_step - active.done
        taking_part = self.run.capacities.taking_part(record.stage)
        self.federation.begin_stage(
            active.engine.layout,
            active.adapter,
            rounds=range(begin, min(begin + record.rounds, state.max_steps)),
            done=active.done,
            elapsed=self.run.ledger.totals(record.stage)["simulated_seconds"] if active.done else 0.0,
            shares={client: active.share_of(stage) for client, stage in taking_part.items()},
            flops=self._expected_flops(active),
        )
        active.add_to_weights(self.run.residual)
        self.clients.begin_stage(active, range(state.global_step, min(begin + record.rounds, state.max_steps)))

    def _expected_flops(self, active: ActiveStage) -> list[float]:
        """Estimate what a round of a stage asks of each client; nothing without a clock."""
        if self.federation.selection.resources is None:
            return []
        args = self.trainer.args
        per_token = flops_per_token(active.model, is_reference=self.trainer.kind == "dpo")
        rows = args.local_steps * args.gradient_accumulation_steps * args.train_batch_size
        clients = self.run.clients
        return expected_flops(self.trainer.train_dataset, list(clients.rows.values()), rows, per_token)

    def stage_factory(self, base: PreTrainedModel) -> StageFactory:
        """Return the factory of all stages, on the base."""
        trainer, run, args = self.trainer, self.run, self.trainer.args
        if self._factory is None:
            rows = server_rows(trainer) if args.asks_server_texts else None
            self._factory = StageFactory(
                args=args,
                stages=run.stages,
                builder=SubmodelBuilder(
                    base, args.stack, run.adapter.state if chooses_layers(run.adapter.config) else None
                ),
                teacher=ServerTeacher(
                    args, rows, trainer.processing_class, trainer.server_batches, self.autocast, run.healed
                ),
                calibration=CalibrationLoss(
                    lambda: trainer.server_batches(rows, args.eval_batch_size),
                    functools.partial(_loss_of, trainer),
                    lambda base: self.models.count_logits(base, lambda: True),
                    self.autocast,
                    args.device,
                    args.process_index,
                    args.world_size,
                    args.seed,
                ),
                capacities=run.capacities,
                batching=self._batching,
                recomputation=Recomputation(
                    trainer, self._batching, base, run.adapter.config, self.models.computes_all_logits
                ),
                build_engine=self.models.build_engine,
                reseed=self.seed_round,
            )
        return self._factory

    # --- rounds ---------------------------------------------------------------------------------------------

    def runner(self, active: ActiveStage) -> StageRunner:
        """Make what trains a stage's clients."""
        trainer = self.trainer
        pad = getattr(trainer.processing_class, "pad_token_id", None)
        return StageRunner(
            stage=active,
            hooks=trainer,
            local_training=self._local_training,
            batching=self._batching,
            placement=trainer.placement,
            trains=lambda client: self.run.capacities.trains(client, active.record.stage),
            add_up=add_up,
            privacy=self._privacy,
            using=self.models.using,
            seed=trainer.args.seed,
            pad_token=getattr(trainer.model.config, "pad_token_id", None) or 0 if pad is None else pad,
            is_reference=trainer.kind == "dpo",
        )

    def batches_of(self, rounds: Iterable[int], attempt: int) -> ClientBatches:
        """Make the batches of this process's clients in these rounds."""
        order = local_trainings(self.federation.selection, self.trainer.placement, rounds, attempt)
        trainer = self.trainer
        rows, collator = trainer.client_rows()
        each_clients = list(trainer.clients.rows.values())
        everything = trainer.train_dataset  # the collator takes no column of lengths
        sampler = make_sampler(trainer.args, everything, each_clients, order, trainer.placement, self._privacy)
        return client_loader(rows, collator, sampler, trainer.args)

    @property
    def hands_on_newest(self) -> bool:
        """Whether the stage would hand on the newest round, not a better one that was saved."""
        return not self.trainer.args.load_best_model_at_end or self.trainer.state.best_global_step is None

    def run_round(self, active: ActiveStage, learning_rate: float) -> RoundOutcome:
        """Run one round: train the sampled clients, aggregate, record. Changes the stage's adapter."""
        started, index = time.perf_counter(), self.trainer.state.global_step
        self.peak_memory.reset()
        outcome = self.federation.run(index, active.adapter, self.clients.exchange(learning_rate))
        active.adapter = outcome.adapter
        active.add_to_weights(self.run.residual)
        active.engine.begin_client(active.adapter, learning_rate)  # nothing of the last client stays
        if self.hands_on_newest:
            active.record.metrics = {}  # they were of the round before
        seconds, peak = time.perf_counter() - started, self.peak_memory.read()
        self.run.record_round(outcome, index, seconds, peak)
        return outcome

    def finish(self, active: ActiveStage, ignore_keys: list[str] | None) -> None:
        """Finish a stage: transfer its adapter to full depth, measure that, write it, show it, push it.

        Args:
            ignore_keys: see `evaluate_full_depth`.
        """
        trainer, run, record = self.trainer, self.run, active.record
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        compact = run.hand_on(Path(best) if best is not None else None)
        active.release()
        self.models.release()
        if trainer.eval_dataset is not None:
            self.models.use_whole(run)
            known = record.metrics if active.is_whole else {}
            record.metrics |= evaluate_full_depth(trainer, record.stage, known, ignore_keys)
        if trainer.args.process_index == 0:
            rows = table_rows(run.stages[: record.stage], run.start_metrics)
            publisher = trainer.publisher if trainer.args.push_to_hub else None
            self._report(publisher and publisher.pusher.full_name()).write(
                run.result(record, compact), rows, trainer.state.log_history, run.ledger,
                functools.partial(self.save_finished, record.stage),
            )  # fmt: skip
            if publisher is not None and publisher.pushes_each_stage:
                trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
                publisher.submit_stage(record.stage)
            if not trainer.args.disable_tqdm:
                self._table.show(rows)
        trainer.accelerator.wait_for_everyone()

    # --- files ----------------------------------------------------------------------------------------------

    def _report(self, repo_id: str | None) -> RunReport:
        """Make what writes the stages' folders and cards.

        Args:
            repo_id: the repository that they will be pushed to, or None.
        """
        trainer, args = self.trainer, self.trainer.args
        return RunReport.of(
            args,
            self.models.base.config,
            processor=trainer.processing_class,
            setup=describe_setup(args, self.run.clients, self.run.adapter.config, self.run.accountant),
            evaluation_rows=number_of_rows(trainer.eval_dataset),
            simulated=self.run.clients.elsewhere is None,
            baseline=self.run.baseline,
            repo_id=repo_id,
        )

    def save_checkpoint(self, run_dir: Path) -> None:
        """Write a whole `checkpoint-N/` of a run in one move, on the main process; push it and delete the oldest,
        where asked."""
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        target = run_dir / f"checkpoint-{state.global_step}"
        state.best_model_checkpoint = best_checkpoint(state, run_dir, target)
        if args.should_save:
            self._write_checkpoint(target)
            if trainer.publisher is not None and args.push_to_hub:
                trainer.publisher.submit_checkpoint(target, state.global_step)
            rotate(run_dir, args, state)
            self._keep_states(target)
        trainer.accelerator.wait_for_everyone()
        self.saved_round = state.global_step

    def _take_up(self, checkpoint: Checkpoint) -> None:
        """Find again what a run that goes on had: its best round, and stages that were not pushed."""
        trainer, state = self.trainer, self.trainer.state
        is_best = checkpoint.run.within and state.best_global_step == state.global_step  # whatever its name is now
        recorded = Path(state.best_model_checkpoint or "")
        is_there = recorded.name == f"checkpoint-{state.best_global_step}" and is_of_run(recorded, self.run.ledger)
        state.best_model_checkpoint = str(checkpoint.folder) if is_best else str(recorded) if is_there else None
        state.best_model_checkpoint = best_checkpoint(state, checkpoint.folder.parent)
        is_lost = checkpoint.run.within and state.best_global_step and state.best_model_checkpoint is None
        if is_lost and trainer.args.load_best_model_at_end:
            logger.warning(
                f"round {state.best_global_step}, the best of its stage so far, has no checkpoint beside "
                f"{checkpoint.folder}: the best of the rounds to come is handed on, or the last one."
            )
            state.best_metric = state.best_global_step = None
            self.run.stages[checkpoint.run.stage - 1].metrics = {}
        if trainer.publisher is not None and trainer.args.push_to_hub:
            trainer.publisher.catch_up(checkpoint.run.stage)

    def _keep_states(self, newest: Path) -> None:
        """Have clients keep what the run may go back to."""
        best = self.trainer.state.best_model_checkpoint
        self.clients.may_go_back_to([newest] if best is None else [newest, Path(best)])

    def _write_checkpoint(self, target: Path) -> None:
        trainer, active = self.trainer, self.run.active
        with atomic_folder(target) as folder:
            trainer.save_model(str(folder), _internal_call=True)
            if trainer.args.save_only_model:
                save_federation(folder, self.federation.state_dict(), self.run.accountant is not None)
                return
            self._save_state(folder, active.record.stage, active.done, trainer.control.should_epoch_stop)
            if (schedule := self.schedule.state_dict()) is not None:
                write_json(folder / SCHEDULE, schedule)

    def save_finished(self, stage: int, folder: Path) -> None:
        """Write what a finished stage's folder holds beside its adapters, card and plot."""
        self._save_state(folder, stage + 1)
        self.run.healed.copy_into(folder / SUBMODEL, stage)

    def _save_state(self, folder: Path, stage: int, done: int | None = None, is_over: bool = False) -> None:
        """Write what a run needs to go on, but for the adapters and the schedule; see `FederatedRun.save_state`."""
        self.run.save_state(folder, stage, done, is_over)
        state = self.trainer.state
        for callback in (*self.trainer.callback_handler.callbacks, self.trainer.control):
            if (name := type(callback).__name__) in state.stateful_callbacks:
                state.stateful_callbacks[name] = callback.state()
        state.save_to_json(str(folder / TRAINER_STATE_NAME))
        note_checksum(folder / TRAINER_STATE_NAME)


def _loss_of(trainer: FederatedTrainer, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Of a model on a batch; a `compute_loss_func` may divide by the number of labelled tokens."""
    if trainer.compute_loss_func is None:
        return trainer.compute_loss(model, inputs)
    with each_batch_alone(trainer.args):
        _, items, _ = next_step(trainer, iter([inputs]), 1)
        return trainer.compute_loss(model, inputs, num_items_in_batch=items)


def server_rows(trainer: FederatedTrainer) -> Dataset | None:
    """Return the server's own rows, that grouping and teaching may ask; else as many of each evaluation set."""
    count, given = trainer.args.calibration_samples, trainer.calibration_dataset
    if given is not None:
        return first_rows(given, count)
    sets = list(named_sets(trainer.eval_dataset).values())
    if len(sets) == 1:
        return first_rows(sets[0], count)
    alike = [name for name, kind in sets[0].features.items() if all(each.features.get(name) == kind for each in sets)]
    parts = [first_rows(each.select_columns(alike), -(-count // len(sets))) for each in sets]
    return first_rows(concatenate_datasets(parts), count)
