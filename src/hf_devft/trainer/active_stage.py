"""The stage that is being trained."""

from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from hf_devft.configuration import StageConfig
from hf_devft.federation.clients.batched import ClientAxis
from hf_devft.models.engines import Engine
from hf_devft.models.layout import State
from hf_devft.models.residual import PatchedBaseWeights
from hf_devft.stages.global_adapter import GlobalAdapter


@dataclass(frozen=True)
class EarlierSubmodel:
    """An earlier stage's submodel, for clients that can hold no more."""

    record: StageConfig
    engine: Engine
    layers: list[nn.Module]


@dataclass(frozen=True)
class BatchedClients:
    """The stage's model for `count` clients in one batch."""

    engine: Engine
    axis: ClientAxis
    count: int


@dataclass
class ActiveStage:
    """A stage from the moment it is entered.

    Attributes:
        record: what will be saved of it.
        engine: its model, ready to train; model: base with adapter, as in `engine`.
        origin: the full-depth adapter that it starts from.
        adapter: the global adapter of the submodel, flat, on the device.
        config: of that, which may be on more modules than the full model's.
        head: name of the module that only the submodel has an adapter on, or None.
        layers: the submodel's.
        patched: its weights, where the method adds to them.
        earlier: submodels of earlier stages that some clients train instead, by stage.
        batched: what several clients train in one batch, or None where they train one after another.
        base_bytes: of the submodel's base weights.
        done: rounds so far.
        is_over: whether it was told to end, before it was resumed.
        setup: what it took to enter it, by the names of `StageConfig.totals`.
    """

    record: StageConfig
    engine: Engine
    origin: GlobalAdapter
    adapter: torch.Tensor
    config: PeftConfig
    head: str | None
    layers: list[nn.Module]
    patched: PatchedBaseWeights | None
    earlier: dict[int, EarlierSubmodel]
    batched: BatchedClients | None
    base_bytes: int
    done: int = 0
    is_over: bool = False
    setup: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> PeftModel:
        """The submodel with its adapter."""
        return self.engine.peft_model

    @property
    def is_whole(self) -> bool:
        """Whether the submodel is the full model."""
        return self.head is None and all(len(group) == 1 for group in self.groups)

    @property
    def state(self) -> State:
        """The submodel's global adapter."""
        return self.engine.layout.state(self.adapter)

    def share_of(self, stage: int) -> float:
        """The part of the adapter's values that a client has which trains the submodel of `stage`."""
        if stage not in self.earlier:
            return 1.0
        return sum(self.earlier[stage].engine.layout.sizes) / sum(self.engine.layout.sizes)

    def expand(self, sub: State) -> GlobalAdapter:
        """The full-depth adapter, where the submodel's is `sub`."""
        return self.origin.expand(self._drop_temporary_head(sub), self.groups, self.record.transfer)

    def expand_partial_state(self, sub: State, is_adapter: bool = False) -> State:
        """Some of the submodel's tensors at full depth; see `GlobalAdapter.expand_partial_state`."""
        return self.origin.expand_partial_state(
            self._drop_temporary_head(sub), self.groups, self.record.transfer, is_adapter
        )

    def to_peft(self, sub: State, residual: State) -> tuple[PeftConfig, State]:
        """The submodel's adapter as plain PEFT puts it on the plain submodel."""
        return self.origin.compact_to_peft(self.config, sub, self.groups, residual)

    def add_to_weights(self, residual: State) -> None:
        """Make the submodel's weights the base's plus what the method adds."""
        if self.patched is not None:
            self.patched.set(residual)

    def release(self) -> None:
        """Let go of the submodels, which nobody trains any more."""
        self.layers, self.earlier, self.patched, self.batched = [], {}, None, None

    @property
    def groups(self) -> list[list[int]]:
        """The layers of the base in each group."""
        assert self.record.groups is not None  # they are found before the stage is entered
        return self.record.groups

    def _drop_temporary_head(self, sub: State) -> State:
        """Leave out what only the submodel has an adapter on."""
        return sub if self.head is None else {key: value for key, value in sub.items() if f".{self.head}." not in key}
