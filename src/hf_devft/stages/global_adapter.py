"""The full-depth adapter: what a stage starts from, and what it hands on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from hf_devft.models.adapter import attach_adapter, remap_layers_to_transform
from hf_devft.models.initialisation import move_weights, on_whole_weights
from hf_devft.models.layer_stack import LayerNames
from hf_devft.models.layout import State
from hf_devft.models.residual import product_adapter
from hf_devft.stages.grouping import Groups
from hf_devft.stages.transfer import expand_adapter, fuse_adapter, keep_layers


@dataclass(frozen=True)
class GlobalAdapter:
    """The adapter of the full model.

    Attributes:
        config: by which PEFT makes it.
        state: its tensors.
        names: of the full model's layers.
        initial: its tensors as they were taken out of the base's weights (PiSSA, OLoRA); empty for other
            initialisations.
    """

    config: PeftConfig
    state: State
    names: LayerNames
    initial: State = field(default_factory=dict)

    def fuse(self, groups: Groups, fusion: str, beta: float = 0.0, adapted: Collection[int] | None = None) -> State:
        """Fuse it over these groups: the adapter of their submodel; see `fuse_adapter`.

        Args:
            adapted: the submodel's layers that have one; None for all.
        """
        fused = fuse_adapter(self.state, self.names, groups, fusion, beta)
        return keep_layers(fused, self.names, adapted)

    def expand(self, sub: State, groups: Groups, transfer: str) -> "GlobalAdapter":
        """Transfer what a stage has trained, `sub`, to full depth; returns a new adapter. See `expand_adapter`."""
        return replace(self, state=expand_adapter(sub, self.state, self.names, groups, transfer))

    def expand_partial_state(self, sub: State, groups: Groups, transfer: str, is_adapter: bool) -> State:
        """Transfer some of a submodel's tensors to full depth. Layers that receive nothing have the global adapter's
        values, where `sub` are an adapter's, else zeros."""
        full = expand_adapter({key: torch.zeros_like(value) for key, value in sub.items()}, {}, self.names, groups)
        full = self._on_all_layers(full)
        if not is_adapter:  # no magnitudes of weights, whose changes would be compared
            return full | expand_adapter(sub, {}, self.names, groups, transfer)
        full = {key: self.state[key] for key in full if key in self.state}  # some layers may have no adapter
        return expand_adapter(sub, full, self.names, groups, transfer)

    def _on_all_layers(self, zeros: State) -> State:
        """Add what other layers have by the same names, also zeros, where only some layers are in a state."""
        names = {parts[1] for key in zeros if (parts := self.names.split(key)) is not None}
        others = {
            key: torch.zeros_like(value)
            for key, value in self.state.items()
            if key not in zeros and (parts := self.names.split(key)) is not None and parts[1] in names
        }
        return others | zeros

    def config_of(self, groups: Groups, adapted: Sequence[int] | None = None) -> PeftConfig:
        """Return the config of the adapter of the submodel of these groups, on all or some of its layers."""
        return remap_layers_to_transform(self.config, [group[0] for group in groups], adapted)

    # --- on a model -----------------------------------------------------------------------------------------

    def attach(self, base: PreTrainedModel, residual: State) -> PeftModel:
        """Put it on the full base (changed in place), with what a method adds to the weights beside it."""
        config, state = product_adapter(self.config, self.state, residual)
        model = attach_adapter(base, config, state)
        if self.initial:
            move_weights(model, config, self.initial)
            # For PEFT to save.
            model.peft_config[model.active_adapter].init_lora_weights = config.init_lora_weights
        return model

    def move_weights(self, model: PeftModel, groups: Groups) -> None:
        """Take out of a submodel's weights (copies, in place) what its adapter has from the start, where it has
        some."""
        if self.initial:
            move_weights(model, self.config, self._initial_of(groups))

    # --- for plain PEFT -------------------------------------------------------------------------------------

    def to_peft(self, residual: State) -> tuple[PeftConfig, State]:
        """Convert it to what plain PEFT puts on the base: with what has changed the base's weights."""
        if self.initial:
            return on_whole_weights(self.config, self.state, self.initial)
        return product_adapter(self.config, self.state, residual)

    def compact_to_peft(
        self, config: PeftConfig, sub: State, groups: Groups, residual: State
    ) -> tuple[PeftConfig, State]:
        """Convert a submodel's adapter likewise, to what plain PEFT puts on the plain submodel."""
        if self.initial:
            return on_whole_weights(config, sub, self._initial_of(groups))
        return product_adapter(config, sub, residual)

    def _initial_of(self, groups: Groups) -> State:
        return fuse_adapter(self.initial, self.names, groups, "anchor")
