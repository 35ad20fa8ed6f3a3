"""`StageMixin`: into a stage and out of it, between the full base with its adapter and a submodel with its own."""

import functools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_devft.checkpoint import Checkpoint
from hf_devft.configuration import StageConfig
from hf_devft.data import first_rows
from hf_devft.engines import Engine, make_engine, shard
from hf_devft.federation.client_axis import ClientAxis, stack_clients
from hf_devft.federation.ledger import flops_per_token
from hf_devft.federation.methods import Residual
from hf_devft.layout import State
from hf_devft.stages.adapter import adapter_state, attach_adapter, detach_adapter, of_groups, with_head
from hf_devft.stages.grouping import GroupingTask, Groups, group_layers
from hf_devft.stages.layer_stack import LayerStack, encoders_of, find_layer_stack, with_layers
from hf_devft.stages.principal import move_weights, on_whole_weights
from hf_devft.stages.residual import OpenWeights, product_adapter
from hf_devft.stages.submodel import build_whole, layers_of
from hf_devft.stages.transfer import expand_adapter, fuse_adapter, kinds_by_adapter
from hf_devft.stages.weights import is_stored, stored_bytes


@dataclass(frozen=True)
class Smaller:
    """An earlier stage's submodel, for clients that can hold no more."""

    stage: StageConfig
    model: PeftModel
    engine: Engine
    layers: list[nn.Module]


@dataclass(frozen=True)
class Together:
    """The running stage's model for `count` clients in one batch."""

    model: PeftModel
    engine: Engine
    axis: ClientAxis
    count: int


@dataclass
class Running:
    """The stage that is being trained.

    Attributes:
        stage, stack: its record, and the base's layers.
        adapter: the global adapter of the submodel, flat, on the device.
        done: rounds so far.
        config: of its adapter, which may be on more than the full model's.
        head: name of the module that only the submodel has an adapter on, or None.
        layers: the submodel's.
        weights: those that a residual is added to, where the method has one.
        smaller: submodels of earlier stages that some clients train instead, by stage.
        together: what several clients train in one batch, or None where they train one after another.
        setup: what it took to set the stage up.
        in_tuple: whether the layers return tuples, where that was asked for.
    """

    stage: StageConfig
    stack: LayerStack
    adapter: torch.Tensor
    done: int
    config: LoraConfig
    head: str | None
    layers: list[nn.Module]
    weights: OpenWeights | None
    smaller: dict[int, Smaller]
    together: Together | None
    setup: dict[str, float]
    in_tuple: bool | None = None


class StageMixin:
    """Makes submodels and the full model the one that is trained or evaluated, and carries adapters between them."""

    def _enter_stage(self, stage: StageConfig, checkpoint: Checkpoint | None) -> None:
        """Full model and adapter -> submodel and its adapter, ready to train."""
        started = time.perf_counter()
        self._peak_memory.release()
        self._peak_memory.reset()
        base = self._release()
        stack = self._layer_stack(base)
        if checkpoint and checkpoint.sub is not None:
            adapter = checkpoint.sub
        else:
            stage.totals = {}
            stage.groups = self._group(stage, base, stack)
            fuse = functools.partial(
                fuse_adapter,
                names=stack.names,
                groups=stage.groups,
                fusion=stage.adapter_fusion,
                beta=stage.fusion_beta,
            )
            adapter = fuse(self._full_adapter)
            self._federation.memory.carry(lambda name, state: fuse(state))
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        self._stage_was_over = bool(checkpoint and checkpoint.run.stage_over)
        submodel = self._submodel(stage, base, stack)
        base_bytes = sum(map(stored_bytes, submodel.parameters()))
        has_head = self.args.temporary_head and stage.num_layers < stage.full_layers
        config = of_groups(self.peft_config, stage.groups)
        config, head = with_head(config, submodel) if has_head else (config, None)
        model = attach_adapter(submodel, config, adapter, grows=has_head)
        self._move_weights(model, stack, stage.groups)
        if stage.stage > 1 and self.args.distillation_steps and not (checkpoint and checkpoint.sub is not None):
            self._distil(stage, base, stack, model)
        adapter = adapter_state(model)
        weights = OpenWeights(model) if self._federation.method.needs_room else None
        stacked = self._stack(model)  # before an engine wraps the model
        self._use(model, train=True)
        self._running = Running(
            stage=stage,
            stack=stack,
            adapter=self.engine.layout.flat(adapter).to(self.args.device),
            done=checkpoint.run.done if checkpoint else 0,
            config=config,
            head=head,
            layers=layers_of(submodel, stack, stage.groups),
            weights=weights,
            smaller=self._make_smaller(stage, base, stack),
            together=Together(stacked[0], self._engine_beside(stacked[0]), *stacked[1:]) if stacked else None,
            setup={
                "setup_seconds": time.perf_counter() - started,
                "setup_peak_memory": self._peak_memory.read(),
                "setup_flops": stage.totals.get("setup_flops", 0.0),  # of before, in a run that goes on
                "base_bytes": base_bytes,
            },
        )
        done = self._running.done
        begin = self.state.global_step - done
        self._federation.begin_stage(
            self.engine.layout,
            self._running.adapter,
            rounds=range(begin, min(begin + stage.rounds, self.state.max_steps)),
            done=done,
            shares=self._shares(stage),
            flops=self._expected_flops(flops_per_token(model, encoders=encoders_of(submodel))),
        )
        self._apply_residual()
        self._peak_memory.release()

    def _layer_stack(self, base: PreTrainedModel) -> LayerStack:
        """The stack that stages shorten; layers with an adapter share no group with those that `layers_to_transform`
        leaves without one."""
        stack = find_layer_stack(base, self.args.stack)
        if getattr(self.peft_config, "layers_to_transform", None) is None:
            return stack
        return replace(stack, kinds=kinds_by_adapter(self._full_adapter, stack.names, stack.kinds))

    def _make_smaller(self, stage: StageConfig, base: PreTrainedModel, stack: LayerStack) -> dict[int, Smaller]:
        """The submodels of earlier stages that clients train in this one, by stage."""
        held = {self._held_by(client, stage).stage for client in self._candidates(stage)} - {stage.stage}
        smaller = {}
        for number in held:
            earlier = self.stages[number - 1]
            model = self._submodel_of(earlier, base, stack)
            layers = layers_of(model.get_base_model(), stack, earlier.groups)
            smaller[number] = Smaller(earlier, model, self._engine_beside(model), layers)
        return smaller

    def _submodel_of(self, earlier: StageConfig, base: PreTrainedModel, stack: LayerStack) -> PeftModel:
        """An earlier stage's submodel, with the anchors' adapters as they are now."""
        submodel = self._submodel(earlier, base, stack)
        adapter = fuse_adapter(self._full_adapter, stack.names, earlier.groups, "anchor")
        model = attach_adapter(submodel, of_groups(self.peft_config, earlier.groups), adapter)
        self._move_weights(model, stack, earlier.groups)
        return model

    def _initial_of(self, stack: LayerStack, groups: Groups) -> State:
        return fuse_adapter(self._initial, stack.names, groups, "anchor")

    def _move_weights(self, model: PeftModel, stack: LayerStack, groups: Groups) -> None:
        """Where the adapter's initial values were taken out of the weights."""
        if self._initial:
            move_weights(model, self.peft_config, self._initial_of(stack, groups))

    def _stack(self, model: PeftModel) -> tuple[PeftModel, ClientAxis, int] | None:
        if (count := self._clients_in_a_batch(model)) == 1:
            return None
        try:
            return *stack_clients(model, count), count
        except Exception as error:  # a module that cannot be copied, say
            self._train_apart(f"the model cannot be copied: {type(error).__name__}: {error}")
            return None

    def _engine_beside(self, model: PeftModel) -> Engine:
        """The engine of a second model to train; the one in use stays that."""
        with self._switched_to(self.model, self.engine):
            self._use(model, train=True)
            return self.engine

    def _make_whole(self) -> None:
        """Make the full model with the full-depth adapter the model, unless it is."""
        if self._whole:
            return
        if self._base is None:
            self._full_adapter = adapter_state(self.model)
        base = self._release()
        config, adapter = product_adapter(self.peft_config, self._full_adapter, self._residual())
        model = attach_adapter(build_whole(base, self.args.stack), config, adapter)
        if self._initial:
            move_weights(model, config, self._initial)
            model.peft_config[model.active_adapter].init_lora_weights = config.init_lora_weights  # for PEFT to save
        self._use(model, train=False)
        self._whole = True

    def _release(self) -> PreTrainedModel:
        """Give up what was built on the base, which is the model for the moment."""
        if self.engine is not None:
            self.engine.close()
        self._whole = False
        if self._base is None:
            self._base = detach_adapter(self.model)
            if self._opened:
                self._opened.close()
            shard(self, self._base)
        self.engine = self._running = self.optimizer = self.callback_handler.optimizer = None
        self.model = self.model_wrapped = self.callback_handler.model = self._base
        return self._base

    def _use(self, model: PeftModel, train: bool) -> None:
        """Make `model` the one that is evaluated, and trained."""
        self.model = model  # which the engine's optimiser is made for
        self._switch_to(model, make_engine(self, model, train))

    def _switch_to(self, model: PeftModel, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.model_wrapped = self.engine.model
        self.optimizer = self.engine.optimizer
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))

    @contextmanager
    def _switched_to(self, model: PeftModel, engine: Engine) -> Iterator[None]:
        """Within this context, `model` is the one in use; what was before is afterwards."""
        before = self.model, self.engine
        self._switch_to(model, engine)
        try:
            yield
        finally:
            self._switch_to(*before)

    def _move_model_to_device(self, model, device) -> None:
        """As `Trainer`'s, but for layers that are still in the checkpoint."""
        if not any(map(is_stored, model.parameters())):
            return super()._move_model_to_device(model, device)
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)

    def _group(self, stage: StageConfig, base: PreTrainedModel, stack: LayerStack) -> Groups:
        whole = functools.cache(lambda: build_whole(base, self.args.stack).to(self.args.device))

        def loss_of(kept: list[int]) -> float:
            if (key := tuple(kept)) not in self._losses:
                self._losses[key] = self._loss_of_layers(whole(), kept)
            return self._losses[key]

        task = GroupingTask(
            kinds=stack.kinds,
            capacity=stage.num_layers,
            seed=self.args.seed,
            similarity=self._similarity,
            loss_of=loss_of,
        )
        # Machines may differ in their last bits: the main process's groups are everyone's.
        return broadcast_object_list([group_layers(task, stage.grouping)])[0]

    @torch.no_grad()
    def _loss_of_layers(self, base: PreTrainedModel, kept: list[int]) -> float:
        """Mean calibration loss of the base with only the layers `kept`, without adapter."""
        model = with_layers(base, self._layer_stack(base), kept).eval()
        losses = {}
        for index, batch in enumerate(self._calibration_batches()):
            if index % self.args.world_size == self.args.process_index:
                with self._autocast():
                    losses[index] = self.compute_loss(model, self._prepare_inputs(batch)).item()
        losses = gather_object([losses]) if self.args.world_size > 1 else [losses]
        return float(np.mean([loss for _, loss in sorted(item for part in losses for item in part.items())]))

    def _autocast(self) -> AbstractContextManager:
        """The precision of training, for a model that no engine has prepared."""
        return torch.autocast(
            self.args.device.type, torch.bfloat16, enabled=self.accelerator.mixed_precision == "bf16"
        )

    def _calibration_batches(self) -> DataLoader:
        """All calibration rows on every process, so that the batches do not depend on the number of processes."""
        rows = self._remove_unused_columns(self._calibration_rows(), description="Calibration")
        return DataLoader(rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def _calibration_rows(self) -> Dataset | None:
        rows = self.calibration_dataset if self.calibration_dataset is not None else self.eval_dataset
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        return first_rows(rows, self.args.calibration_samples)

    def _sub_adapter(self) -> State:
        """The running stage's global adapter."""
        return self.engine.layout.state(self._running.adapter)

    def _expanded(self, sub: State) -> State:
        """The full-depth adapter from the submodel's."""
        running = self._running
        groups, transfer = running.stage.groups, running.stage.transfer
        return expand_adapter(self._lasting(sub), self._full_adapter, running.stack.names, groups, transfer)

    def _remembered(self, sub: State, is_adapter: bool = False) -> State:
        """Some of an adapter's tensors at full depth. Layers that receive nothing have the global adapter's values
        where they are an adapter's, else zeros."""
        names, groups, sub = self._running.stack.names, self._running.stage.groups, self._lasting(sub)
        full = expand_adapter({key: torch.zeros_like(value) for key, value in sub.items()}, {}, names, groups)
        if is_adapter:
            full |= {key: self._full_adapter[key] for key in full if key in self._full_adapter}
        return expand_adapter(sub, full, names, groups, self._running.stage.transfer)

    def _lasting(self, sub: State) -> State:
        """Without what only the submodel has."""
        head = self._running.head
        return sub if head is None else {key: tensor for key, tensor in sub.items() if f".{head}." not in key}

    def _residual(self) -> State:
        """What the method adds to the weights beside the adapter, at the depth where it stands."""
        method = self._federation.method if self._federation is not None else None
        return method.residual() if isinstance(method, Residual) else {}

    def _full_form(self, adapter: State, residual: State) -> tuple[LoraConfig, State]:
        """A full-depth adapter as plain PEFT puts it on the base, with what has changed the base's weights."""
        if self._initial:
            return on_whole_weights(self.peft_config, adapter, self._initial)
        return product_adapter(self.peft_config, adapter, residual)

    def _compact_form(self, sub: State) -> tuple[LoraConfig, State]:
        """The running submodel's adapter, likewise."""
        running = self._running
        if self._initial:
            return on_whole_weights(running.config, sub, self._initial_of(running.stack, running.stage.groups))
        return product_adapter(running.config, sub, self._residual())
