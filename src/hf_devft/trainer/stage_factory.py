"""Into a stage: from the full base and the global adapter to a submodel with its own, ready to train."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.federation.clients.batched import stack_clients
from hf_devft.federation.heterogeneity.capacity import Capacities
from hf_devft.models.adapter import adapter_state, attach_adapter, with_head
from hf_devft.models.engines import Engine
from hf_devft.models.layout import State
from hf_devft.models.residual import PatchedBaseWeights
from hf_devft.models.weights import stored_bytes
from hf_devft.stages.builder import SubmodelBuilder
from hf_devft.stages.global_adapter import GlobalAdapter
from hf_devft.stages.grouping import Groups
from hf_devft.trainer.active_stage import ActiveStage, BatchedClients, EarlierSubmodel
from hf_devft.trainer.calibration import CalibrationLoss
from hf_devft.trainer.client_batching import ClientBatching
from hf_devft.trainer.recomputation import Recomputation
from hf_devft.trainer.server_teacher import ServerTeacher


@dataclass(frozen=True)
class StageFactory:
    """Makes the `ActiveStage` of a run's stages.

    Attributes:
        args: the run's. stages: the records of all of them.
        builder: makes submodels of the base.
        teacher: bridges, heals and distils, where that is asked for.
        calibration: measures losses for `grouping="calibrated"`.
        capacities: which stage's submodel each client trains.
        batching: how many clients share a batch.
        recomputation: has layers computed again in the backward pass, where they must.
        build_engine: (model) -> the engine that trains it; which model the trainer uses stays as it is.
        reseed: makes whatever is drawn next the same on all processes, and in a resumed run.
    """

    args: DevFTConfig
    stages: list[StageConfig]
    builder: SubmodelBuilder
    teacher: ServerTeacher
    calibration: CalibrationLoss
    capacities: Capacities
    batching: ClientBatching
    recomputation: Recomputation
    build_engine: Callable[[PeftModel], Engine]
    reseed: Callable[[], None]

    def group(self, record: StageConfig, adapter: State) -> Groups:
        """Group a stage's layers; the main process's groups are everyone's, as machines may differ in their last
        bits.

        Args:
            adapter: the full-depth adapter that the stage starts from.
        """
        losses_without = self.calibration.of(self.builder)

        def bridge_errors() -> torch.Tensor:
            errors, flops = self.teacher.bridge_errors(self.builder)
            _spend(record, flops)
            return errors

        groups = self.builder.group(
            record.grouping, record.num_layers, self.args.seed, adapter, losses_without, bridge_errors
        )
        return broadcast_object_list([groups])[0]

    def enter(
        self, record: StageConfig, adapter: GlobalAdapter, sub: State, distil: bool, patched: bool
    ) -> ActiveStage:
        """Build a stage whose groups are known, ready to train.

        Args:
            record: its record; what teaching takes of the server is noted there.
            adapter: the full-depth adapter that it starts from. sub: the submodel's.
            distil: whether the submodel is to be taught what that of the stage before answers.
            patched: whether the method adds to the submodel's weights.
        """
        submodel = self._submodel(record)
        base_bytes = sum(map(stored_bytes, submodel.parameters()))
        config, head = adapter.config_of(record.groups, record.adapted), None
        if self.args.temporary_head and record.num_layers < record.full_layers:
            config, head = with_head(config, submodel)
            self.reseed()  # its factors are drawn, whatever was drawn before
        model = attach_adapter(submodel, config, sub, grows=head is not None)
        adapter.move_weights(model, record.groups)
        self.recomputation.settle(record, model)
        if distil:
            self._distil(record, adapter, model)
        weights = PatchedBaseWeights(model) if patched else None
        sub = adapter_state(model)
        batched = self._stack_clients(model)  # before an engine wraps the model
        engine = self.build_engine(model)
        return ActiveStage(
            record=record,
            engine=engine,
            origin=adapter,
            adapter=engine.layout.flat(sub).to(self.args.device),
            config=config,
            head=head,
            layers=self.builder.layers_of(submodel, record.groups),
            patched=weights,
            earlier=self._earlier_submodels(record, adapter),
            batched=batched and BatchedClients(self.build_engine(batched[0]), *batched[1:]),
            base_bytes=base_bytes,
        )

    def _submodel(self, record: StageConfig) -> PreTrainedModel:
        """Build the submodel of a stage whose groups are known, without adapter; bridged or healed where that is
        asked for."""
        submodel = self.builder.build(record.groups, record.fusion, record.fusion_beta)
        if record.is_taught:
            layers = self.builder.layers_of(submodel, record.groups)
            _spend(record, self.teacher.stand_for_base(record, self.builder, submodel, layers))
            self.reseed()
        return submodel

    def _distil(self, record: StageConfig, adapter: GlobalAdapter, student: PeftModel) -> None:
        smaller = self.submodel_of(self.stages[record.stage - 2], adapter)
        self.reseed()  # collators and dropout may draw
        _spend(record, self.teacher.distil(record, smaller, student))
        self.reseed()

    def submodel_of(self, earlier: StageConfig, adapter: GlobalAdapter) -> PeftModel:
        """Build an earlier stage's submodel, with the anchors' adapters as they are now."""
        model = attach_adapter(
            self._submodel(earlier), adapter.config_of(earlier.groups), adapter.fuse(earlier.groups, "anchor")
        )
        adapter.move_weights(model, earlier.groups)
        return model

    def _earlier_submodels(self, record: StageConfig, adapter: GlobalAdapter) -> dict[int, EarlierSubmodel]:
        """Build the submodels of earlier stages that clients train in this one, by stage."""
        found = {}
        for number in set(self.capacities.taking_part(record.stage).values()) - {record.stage}:
            earlier = self.stages[number - 1]
            model = self.submodel_of(earlier, adapter)
            self.recomputation.settle(earlier, model)
            layers = self.builder.layers_of(model.get_base_model(), earlier.groups)
            found[number] = EarlierSubmodel(earlier, self.build_engine(model), layers)
        return found

    def _stack_clients(self, model: PeftModel) -> tuple | None:
        """Build (a model for several clients, their axis, how many they are); None where each trains by itself."""
        if (count := self.batching.count(model)) == 1:
            return None
        try:
            return *stack_clients(model, count), count
        except Exception as error:  # a module that cannot be copied, say
            self.batching.disable(f"the model cannot be copied: {type(error).__name__}: {error}")
            return None


def _spend(record: StageConfig, flops: float) -> None:
    """Note what teaching took of the server."""
    record.totals["setup_flops"] = record.totals.get("setup_flops", 0.0) + flops
