"""`DevFTMixin`: stages -> rounds -> artifacts on top of any `Trainer` subclass, and nothing below that."""

import copy
import functools
import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from hf_devft.checkpoint import SCHEDULE, Checkpoint, RunState, load_federation, save_federation
from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.data import first_rows
from hf_devft.engines import Engine
from hf_devft.evaluation import EvaluationMixin
from hf_devft.federating import FederationMixin
from hf_devft.federation.client import LocalTraining
from hf_devft.federation.ledger import Ledger, PeakMemory, RoundRecord
from hf_devft.federation.methods import make_methods
from hf_devft.federation.partition import ClientData, hold_out, make_clients
from hf_devft.federation.rounds import Federation, RoundOutcome
from hf_devft.federation.sampling import Placement, client_seed
from hf_devft.files import atomic_folder
from hf_devft.hub.artifacts import SUBMODEL, download_stage, load_adapter, newest_commit, save_adapter
from hf_devft.layout import State
from hf_devft.local_training import LocalTrainingMixin
from hf_devft.progress import RoundProgressCallback, print_stages
from hf_devft.pushing import PushMixin
from hf_devft.report import RunReport, describe_setup, with_start
from hf_devft.schedule import RoundSchedule
from hf_devft.stages.adapter import adapter_state, with_head
from hf_devft.stages.grouping import GroupingTask, group_layers, layer_similarity
from hf_devft.stages.layer_stack import find_layer_stack
from hf_devft.stages.principal import as_initialised, initialise, moves_weights
from hf_devft.stages.residual import OpenWeights, without_residual
from hf_devft.stages.supported import check_adapter, check_rules
from hf_devft.stages.transfer import check_alike
from hf_devft.stages.weights import is_stored, keep_readable
from hf_devft.staging import Running, StageMixin
from hf_devft.tasks import TASKS
from hf_devft.teaching import TeachingMixin


def clients_of(args: DevFTConfig, train_dataset: Any, partitioner: Any = None) -> ClientData:
    """The clients that `args` asks for; see `make_clients`."""
    return make_clients(
        train_dataset,
        partitioner,
        num_clients=args.num_clients,
        kind=args.partition,
        column=args.partition_column,
        alpha=args.dirichlet_alpha,
        seed=args.seed,
    )


class DevFTMixin(StageMixin, TeachingMixin, FederationMixin, LocalTrainingMixin, EvaluationMixin, PushMixin):
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
            `args.distillation_steps` and `grouping="calibrated"` (whose default is `eval_dataset`).

    Raises:
        ValueError: data, adapter or options that cannot be trained this way; before any work is spent.
    """

    # One that takes a part of the base's weights into the new adapter, see `stages.principal`.
    _initialisation: str | None = None

    def __init__(
        self,
        model: Any = None,
        args: DevFTConfig | None = None,
        *,
        train_dataset: Dataset | dict[str, Dataset] | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        partitioner: Any = None,
        calibration_dataset: Dataset | None = None,
        **kwargs,
    ):
        if not isinstance(args, DevFTConfig):
            raise ValueError(f"args must be a DevFTConfig, not {type(args).__name__}.")
        if kwargs.get("optimizers", (None, None)) != (None, None):
            raise ValueError(
                "optimizers cannot be passed: each client starts a fresh one. Set `optim` and `learning_rate`, pass "
                "`optimizer_cls_and_kwargs`, or override `create_optimizer`."
            )
        if kwargs.get("model_init") is not None:
            raise ValueError("model_init is not supported: pass `model`.")
        method, _, _ = make_methods(args.federated_method, args.federated_method_kwargs)  # raises, and says why
        if method.partial:
            args.ddp_find_unused_parameters = True  # parts of the adapter take turns
        clients = (
            train_dataset if isinstance(train_dataset, ClientData) else clients_of(args, train_dataset, partitioner)
        )
        if args.client_eval_size is not None:
            if eval_dataset is not None:
                raise ValueError("client_eval_size holds the clients' own rows out: leave `eval_dataset` out.")
            clients, eval_dataset = hold_out(clients, args.client_eval_size, args.seed)
        if args.clients_per_round > len(clients.rows):
            raise ValueError(
                f"clients_per_round={args.clients_per_round}, but there are {len(clients.rows)} clients: lower it."
            )
        eval_dataset = first_rows(eval_dataset, args.max_eval_samples)
        self._given_clients = clients
        super().__init__(model=model, args=args, train_dataset=clients.dataset, eval_dataset=eval_dataset, **kwargs)
        if args.task not in (None, "text-generation"):
            # Most of these models take `num_items_in_batch` and ignore it: their losses are means over the batch.
            self.model_accepts_loss_kwargs = False
        clients = self._as_prepared(clients)
        if args.deepspeed_plugin is not None and self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise ValueError(
                f"DeepSpeed was asked for, but Accelerate runs {self.accelerator.distributed_type.value}: launch by "
                "`accelerate launch` with a config like recipes/accelerate/zero3.yaml."
            )
        self.clients = clients
        self.calibration_dataset = calibration_dataset
        self.ledger = Ledger()
        self.engine: Engine | None = None
        self.placement = Placement(args.client_placement, args.process_index, args.world_size)
        cuts = self.placement.shares_batches or args.auto_find_batch_size
        if cuts and not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            raise ValueError(
                'client_placement="data_parallel" and auto_find_batch_size cut a batch in uneven parts, so the loss '
                "must be a mean over all its tokens: use a model that takes `num_items_in_batch`, or pass "
                "`compute_loss_func`."
            )
        self._running: Running | None = None
        self._federation: Federation | None = None
        self._base: PreTrainedModel | None = None  # the full base without adapter, from the first stage on
        self._checkpoint: Checkpoint | None = None
        # Whether the model is the full one with the full-depth adapter; a base that is still in its checkpoint is not.
        self._whole = not any(map(is_stored, self.model.parameters()))
        if not isinstance(self.model, PeftModel):
            raise ValueError("the model has no adapter to train: pass `peft_config=LoraConfig(...)`.")
        if len(self.model.peft_config) != 1:
            raise ValueError(f"the model has several adapters {list(self.model.peft_config)}: leave one.")
        keep_readable(self.model)
        self.peft_config: PeftConfig = copy.deepcopy(self.model.peft_config[self.model.active_adapter])
        self.peft_config.inference_mode = False
        check_adapter(self.peft_config)
        if self._initialisation is not None:
            self.peft_config.init_lora_weights = self._initialisation
        check_rules(self.peft_config, args)
        self._opened: OpenWeights | None = None  # of the model as it is now
        if self._initialisation is not None:
            self._opened = initialise(self.model, self._initialisation)
        self._full_adapter: State = adapter_state(self.model)
        self._initial: State = self._full_adapter if self._opened else {}
        stack = self._layer_stack(self.model.get_base_model())
        check_alike(self._full_adapter, stack.names, stack.kinds)
        if getattr(self.peft_config, "layers_to_transform", None) is not None and len(stack.names.lists) > 1:
            raise ValueError("layers_to_transform means layers of an encoder and of a decoder: choose one by `stack`.")
        self._check_federation()
        if (
            args.temporary_head
            and (head := with_head(self.peft_config, self.model.get_base_model())[1])
            and any(f".{head}." in key for key in self._full_adapter)
        ):
            raise ValueError(f"temporary_head adapts {head}, which `target_modules` has already: leave one out.")
        self.stages = args.resolve_stages(len(stack))
        for stage in self.stages:
            if (able := len(self._candidates(stage))) < args.clients_per_round:
                raise ValueError(
                    f"stage {stage.stage} has {stage.num_layers} layers, which only {able} clients can hold by "
                    f"client_max_layers={args.client_max_layers}, but a round asks {args.clients_per_round}: let more "
                    "clients hold more."
                )
        for stage in self.stages:
            if stage.num_layers < len(set(stack.kinds)):
                group_layers(GroupingTask(stack.kinds, stage.num_layers))  # raises, and says why
        if args.grouping == "calibrated" and self._calibration_rows() is None:
            raise ValueError('grouping="calibrated" needs calibration texts: pass `calibration_dataset`.')
        self._check_teaching(method)
        if args.predict_with_generate and (self.eval_dataset is None or self.processing_class is None):
            raise ValueError("predict_with_generate needs `eval_dataset` and `processing_class`.")
        self._losses: dict[tuple[int, ...], float] = {}  # calibration loss of the base with only some layers
        self._similarity = functools.cache(lambda: layer_similarity(find_layer_stack(self._base, self.args.stack)))
        for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            self.remove_callback(callback)
        if not args.disable_tqdm:
            self.add_callback(RoundProgressCallback(self.stages))

    def _to_make(self, adapter: PeftConfig, args: DevFTConfig) -> PeftConfig:
        """The config by which PEFT is to make a new adapter, once the model is loaded; refused before that, where it
        cannot be trained. What takes a part of the base's weights is left to `initialise`."""
        check_adapter(adapter, new=True)
        check_rules(adapter, args)
        if moves_weights(adapter):
            self._initialisation = adapter.init_lora_weights
        return as_initialised(adapter)

    def _as_prepared(self, clients: ClientData) -> ClientData:
        """The clients' rows in what the trainer has made of their dataset."""
        if len(self.train_dataset) != len(clients.dataset):
            raise ValueError(
                f"the trainer made {len(self.train_dataset)} rows of the clients' {len(clients.dataset)}, so it is "
                "not known whose they are: turn off packing and filtering."
            )
        return clients

    # --- the loop: stages, rounds ---------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; also goes on with the stage after a finished one, whose folder is given, and, with
        `args.resume_from_hub` and no checkpoint, after the last one that was pushed there.

        Args:
            resume_from_checkpoint: "last" is the newest checkpoint in `output_dir`, or the start where there is none,
                so that one command starts a run and goes on with it.
        """
        if resume_from_checkpoint == "last":
            folder = Path(self.args.output_dir)
            resume_from_checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
        if not resume_from_checkpoint and self.args.resume_from_hub:
            commit = None
            if self.is_world_process_zero():  # another run may push meanwhile: all take the same commit
                commit = newest_commit(self.args.resume_from_hub, self.args.hub_revision, self.args.hub_token)
            commit = broadcast_object_list([commit])[0]
            with self.args.main_process_first(desc="download of the last stage"):
                resume_from_checkpoint = download_stage(
                    self.args.resume_from_hub, commit, self.args.hub_token, healed=bool(self.args.healing_steps)
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        """`Trainer`'s loop with rounds for steps and stages for epochs."""
        if batch_size != self._train_batch_size:
            raise RuntimeError(
                "out of memory outside of local training, whose steps `auto_find_batch_size` cuts: lower "
                "`per_device_eval_batch_size`, or train fewer layers."
            )
        if resume_from_checkpoint is not None and self._checkpoint is None:
            self._load_from_checkpoint(resume_from_checkpoint)  # `train` leaves it out under DeepSpeed
        checkpoint, self._checkpoint = self._checkpoint, None
        self._forget_healed()
        if checkpoint:
            self._take_up_healed(resume_from_checkpoint, checkpoint)
        if self._residual() and checkpoint is None:
            raise ValueError(
                f"federated_method={self.args.federated_method!r} has changed the base beside the adapter, and "
                "another `train` would begin without that: resume from a checkpoint, or start a new trainer from the "
                "adapter in `output_dir`."
            )
        self._federation = None
        if self._base is not None:
            self._make_whole()  # where a run was interrupted
        start = checkpoint.full if checkpoint else adapter_state(self.model)
        self._check_shapes(start)
        self._full_adapter = start
        planned = sum(stage.rounds for stage in self.stages)
        max_steps = planned if args.max_steps < 0 else min(args.max_steps, planned)
        self._init_training_state(max_steps, max_steps, len(self.stages), resume_from_checkpoint, trial)
        self.ledger = checkpoint.run.ledger if checkpoint else Ledger()
        self._schedule = RoundSchedule(
            self, max_steps, self.state.global_step, checkpoint.schedule if checkpoint else None
        )
        self._federation = self._make_federation(checkpoint)
        self._local_training, self._apart = LocalTraining(self), False
        self._peak_memory = PeakMemory(args.device)
        start_time = time.time()
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._tr_loss, self._total_loss_scalar = torch.zeros((), device=args.device), 0.0
        self._seed_round()

        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and checkpoint is None:
            self._make_whole()
            self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
            self._evaluate_full_depth(stage=0)
        for stage in self.stages[checkpoint.run.stage - 1 if checkpoint else 0 :]:
            self._enter_stage(stage, checkpoint)
            checkpoint = None
            self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
            self.control.should_epoch_stop |= self._stage_was_over
            self._run_stage(trial, ignore_keys_for_eval, start_time)
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            self._log_save_evaluate(None, None, trial, ignore_keys_for_eval, start_time)
            self._finish_stage()
            if self.control.should_training_stop:
                break
        self._make_whole()
        if args.should_save and args.save_strategy != "no":
            # A run that was killed between its last save and the rotation has left one more than it keeps.
            self._rotate_checkpoints(Path(self._get_output_dir(trial=trial)))
        num_samples = max_steps * args.clients_per_round * args.local_steps * args.train_batch_size
        return self._finalize_training(trial, num_samples * args.gradient_accumulation_steps, start_time)

    def _run_stage(self, trial, ignore_keys_for_eval, start_time: float) -> None:
        running = self._running
        while running.done < running.stage.rounds:
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            learning_rate = self._schedule.rate(running.stage.learning_rate)
            grad_norm = self._run_round(learning_rate)
            self._schedule.step()
            running.done += 1
            self.state.global_step += 1
            self._seed_round()
            self.state.epoch = running.stage.stage - 1 + running.done / running.stage.rounds
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._log_save_evaluate(grad_norm, learning_rate, trial, ignore_keys_for_eval, start_time)

    def _run_round(self, learning_rate: float) -> float | None:
        """One round: train the sampled clients, aggregate, record. Returns a gradient norm."""
        started, running = time.perf_counter(), self._running
        self._peak_memory.reset()
        outcome = self._federation.run(
            self.state.global_step, running.adapter, functools.partial(self._train_clients, learning_rate)
        )
        running.adapter = outcome.adapter
        self._apply_residual()
        self.engine.begin_client(running.adapter, learning_rate)  # nothing of the last client stays
        if np.isfinite(outcome.loss) or not self.args.logging_nan_inf_filter:
            self._tr_loss += outcome.loss
        self.state.num_input_tokens_seen += outcome.seen
        self._record(outcome, time.perf_counter() - started)
        return outcome.grad_norm if self.args.max_grad_norm > 0 else None

    def _apply_residual(self) -> None:
        """Make the submodel's weights what the method says."""
        if self._running.weights is not None:
            self._running.weights.set(self._federation.method.residual())

    def _seed_round(self) -> None:
        """Whatever is drawn between rounds is the same on all processes, and in a resumed run."""
        set_seed(client_seed(self.args.seed, self.state.global_step, len(self.clients.rows)))

    def _record(self, outcome: RoundOutcome, seconds: float) -> None:
        self.ledger.add(
            RoundRecord(
                round=self.state.global_step + 1,
                stage=self._running.stage.stage,
                clients=[self.clients.names[client] for client in outcome.sampled],
                dropped=[self.clients.names[client] for client in outcome.left_out],
                bytes_down=outcome.bytes_down,
                bytes_up=outcome.bytes_up,
                tokens=outcome.tokens,
                flops=outcome.flops,
                seconds=seconds,
                peak_memory=self._peak_memory.read(),
                loss=outcome.loss,
                attempts=outcome.attempts,
                late=[self.clients.names[client] for client in outcome.late],
                simulated_seconds=outcome.seconds,
            )
        )

    def _log_save_evaluate(self, grad_norm, learning_rate, trial, ignore_keys_for_eval, start_time) -> None:
        rate = self._schedule.rate(self._running.stage.learning_rate) if learning_rate is None else learning_rate
        self._maybe_log_save_evaluate(
            self._tr_loss,
            grad_norm,
            self.model,
            trial,
            self.state.epoch,
            ignore_keys_for_eval,
            start_time,
            learning_rate=rate,
        )

    # --- a stage is over ------------------------------------------------------------------------------------

    def _finish_stage(self) -> None:
        """Submodel's adapter -> full depth, measured, written, shown."""
        running, stage = self._running, self._running.stage
        sub = self._sub_adapter()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            best = Path(self.state.best_model_checkpoint)
            sub = without_residual(load_adapter(best / SUBMODEL)[1], _rank(self.peft_config))
            self._federation.memory.load_state_dict(load_federation(best))
        compact = self._compact_form(sub)
        self._full_adapter = self._expanded(sub)
        self._federation.end_stage(self._remembered)
        stage.rounds_done = running.done
        stage.totals = self.ledger.totals(stage.stage) | running.setup
        stage.metrics = self._submodel_metrics(stage)
        self._release()
        if self.eval_dataset is not None:
            self._make_whole()
            stage.metrics |= self._evaluate_full_depth(stage.stage)
        if self.is_world_process_zero():
            finished = self.stages[: stage.stage]
            self._report().write(
                finished,
                self._full_form(self._full_adapter, self._residual()),
                compact,
                self.state.log_history,
                self.ledger,
                functools.partial(self._save_finished, stage),
            )
            self._push_stage(stage.stage)
            if not self.args.disable_tqdm:
                print_stages(with_start(finished, self.state.log_history))
        self.accelerator.wait_for_everyone()

    # --- logs and files ---------------------------------------------------------------------------------------------

    def store_flos(self) -> None:
        """`total_flos` is the ledger's count."""
        self.state.total_flos = self.ledger.flops

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the running stage and the bytes sent so far."""
        if self._running is not None:
            logs = logs | {"stage": self._running.stage.stage, "bytes": self.ledger.bytes}
        super().log(logs, start_time)

    def _report(self) -> RunReport:
        config = self._base.config
        return RunReport(
            output_dir=self.args.output_dir,
            tokenizer=self.processing_class,
            base_name=config._name_or_path or None,
            labels=self._labels(config),
            base_revision=getattr(config, "_commit_hash", None),
            setup=describe_setup(self.args, self.clients, self.peft_config),
            repo_id=self._pusher.full_name() if self.args.push_to_hub else None,
            metadata={name: getattr(self.args, f"card_{name}") for name in ("license", "language", "datasets")},
            evaluation_rows=_count(self.eval_dataset) if self.eval_dataset is not None else 0,
        )

    def _labels(self, config: PretrainedConfig) -> list[str] | None:
        if TASKS[self.stages[-1].task].classes is None:
            return None
        return [config.id2label[index] for index in range(config.num_labels)]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The full-depth adapter, and within a stage also the submodel's as it travels."""
        if self._running is not None:
            self._save(output_dir, self._expanded(self._sub_adapter()), self._remembered(self._residual()))
        elif self._base is not None and (not self._whole or self._residual()):
            self._save(output_dir, self._full_adapter, self._residual())  # between two stages
        else:
            self._save(output_dir, adapter_state(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save(
        self, output_dir: str | None = None, state_dict: State | None = None, residual: State | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_adapter(folder, *self._full_form(state_dict, residual or {}))
        if self._running is not None:
            save_adapter(folder / SUBMODEL, *self._compact_form(self._sub_adapter()))
            self._keep_healed(self._running.stage, folder / SUBMODEL)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial) -> None:
        """A whole `checkpoint-N/` in one move, by the main process."""
        run_dir = Path(self._get_output_dir(trial=trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == target or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            with atomic_folder(target) as folder:
                self.save_model(str(folder), _internal_call=True)
                if self.args.save_only_model:
                    save_federation(folder, self._federation.state_dict())
                else:
                    running = self._running
                    self._save_run_state(folder, running.stage.stage, running.done, self.control.should_epoch_stop)
                    torch.save(self._schedule.state_dict(), folder / SCHEDULE)
            self._push_from_checkpoint(target)
            self._rotate_checkpoints(run_dir)
        self.accelerator.wait_for_everyone()

    def _rotate_checkpoints(self, run_dir: Path) -> None:
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _save_run_state(self, folder: Path, stage: int, done: int, over: bool) -> None:
        """What a run needs to go on with the round after `done` of `stage`, but for the adapters and the schedule."""
        federation = self._federation.state_dict()
        RunState(self.stages, stage, done, over, self._setting(), self.ledger, federation).save(folder)
        for callback in (*self.callback_handler.callbacks, self.control):
            if (name := type(callback).__name__) in self.state.stateful_callbacks:
                self.state.stateful_callbacks[name] = callback.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save_finished(self, stage: StageConfig, folder: Path) -> None:
        """What a finished stage's folder holds beside its adapters, card and plot."""
        self._save_run_state(folder, stage.stage + 1, done=0, over=False)
        self._keep_healed(stage, folder / SUBMODEL)

    def _setting(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it continues."""
        args = self.args
        rules = ("grouping", "fusion", "fusion_beta", "transfer", "adapter_fusion", "stack")
        federation = (
            "federated_method",
            "federated_method_kwargs",
            "wire_dtype",
            "wire_top_k",
            "client_selection",
            "client_selection_kwargs",
            "client_max_layers",
            "client_resources",
            "beyond_capacity",
            "temporary_head",
            "clients_per_round",
            "local_steps",
            "seed",
            "data_seed",
        )
        return {name: getattr(args, name) for name in (*rules, *federation)} | {
            "stage_layers": [stage.num_layers for stage in self.stages],
            "lora_alpha": getattr(self.peft_config, "lora_alpha", None),
            "init_lora_weights": self._initialisation,
            "distillation": [args.distillation_steps, args.calibration_samples, args.generation_max_new_tokens]
            if args.distillation_steps
            else None,
            "healing": [
                args.healing_steps,
                args.healing_learning_rate,
                args.calibration_samples,
                args.generation_max_new_tokens,
            ]
            if args.healing_steps
            else None,
            "num_clients": len(self.clients.rows),
            "rows of the clients (checksum)": zlib.crc32(np.concatenate([*self.clients.rows.values()]).tobytes()),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Read and check a checkpoint; the stage it stopped in takes it up."""
        checkpoint = Checkpoint.load(resume_from_checkpoint, _rank(self.peft_config))
        saved, wanted = checkpoint.run.setting, json.loads(json.dumps(self._setting()))  # lists for tuples, as saved
        if differing := [
            f"{name} {saved.get(name)} (now {wanted[name]})" for name in wanted if saved.get(name) != wanted[name]
        ]:
            raise ValueError(
                f"{resume_from_checkpoint} is of a run with {', '.join(differing)}: resume with the same, or start "
                "anew in another `output_dir`."
            )
        self._check_shapes(checkpoint.full, f" in {resume_from_checkpoint}")
        if checkpoint.run.stage > len(self.stages):
            raise ValueError(
                f"{resume_from_checkpoint} is the last stage's: nothing is left to do. To train further, start a new "
                "run from its adapter."
            )
        for stage, old in zip(self.stages, checkpoint.run.stages, strict=True):
            stage.groups, stage.metrics, stage.totals, stage.rounds_done = (
                old.groups, old.metrics, old.totals, old.rounds_done,
            )  # fmt: skip
        self._checkpoint = checkpoint

    def _check_shapes(self, adapter: State, where: str = "") -> None:
        shapes = [{key: tensor.shape for key, tensor in state.items()} for state in (adapter, self._full_adapter)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the adapter{where} is not one of this base and LoRA config: names or shapes differ. Resume with the "
                "same."
            )

    def _load_best_model(self) -> None:
        """Nothing at the end of training: each stage has already taken up its best round."""


def _rank(config: PeftConfig) -> int:
    return config.r if isinstance(config, LoraConfig) else 0


def _count(datasets: Dataset | dict[str, Dataset]) -> int:
    return sum(map(len, datasets.values())) if isinstance(datasets, dict) else len(datasets)
