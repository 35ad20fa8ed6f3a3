"""Whether a stage's layers are computed again in the backward pass."""

import logging
from functools import cached_property

from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from hf_devft.configuration import StageConfig
from hf_devft.models.streaming import empty_copy
from hf_devft.models.weights import is_stored, stored_bytes
from hf_devft.run.client_batches import lengths_of
from hf_devft.run.peak_memory import USABLE, free_memory
from hf_devft.run.planned_submodels import PlannedSubmodels, training_memory
from hf_devft.tasks.data import padded
from hf_devft.trainer.client_batching import ClientBatching
from hf_devft.trainer.interface import FederatedTrainer


logger = logging.getLogger(__name__)


class Recomputation:
    """Switches activation checkpointing on in submodels: where `activation_checkpointing` asks for it and `Trainer`
    has not done it, as over a network; and where `auto_activation_checkpointing` does, and training is planned to take
    more than the memory that there is.

    Args:
        trainer: whose clients' longest rows count.
        batching: how many clients share a batch.
        base: the whole model without adapter.
        peft_config: of the full-depth adapter.
        all_logits: whether the loss is computed of all logits.
    """

    def __init__(
        self,
        trainer: FederatedTrainer,
        batching: ClientBatching,
        base: PreTrainedModel,
        peft_config: PeftConfig,
        all_logits: bool,
    ):
        self._trainer, self._batching = trainer, batching
        self._base, self._peft_config, self._all_logits = base, peft_config, all_logits

    @cached_property
    def _submodels(self) -> PlannedSubmodels:
        return PlannedSubmodels(self._trainer.args, empty_copy(self._base), self._peft_config, self._all_logits)

    def settle(self, record: StageConfig, model: PeftModel) -> None:
        """Switch it on in the submodel of a stage, in place, where it must be: on all processes, or on none."""
        args, base = self._trainer.args, model.get_base_model()
        if base.is_activation_checkpointing or not (args.activation_checkpointing or self._must(record, model)):
            return
        options = dict(args.activation_checkpointing_kwargs or {})
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}  # as `Trainer`
        base.activation_checkpointing_enable(options or None, **own)

    def _must(self, record: StageConfig, model: PeftModel) -> bool:
        """Whether a stage does not fit on the device of one of the processes."""
        trains_here = self._trainer.remote_clients is None  # else each client decides
        can = model.get_base_model().supports_gradient_checkpointing
        if not (self._trainer.args.auto_activation_checkpointing and trains_here and can):
            return False
        reasons = [reason for reason in gather_object([self._why(record, model)]) if reason]
        if reasons and self._trainer.args.process_index == 0:
            logger.warning(f"stage {record.stage} {reasons[0]}: its layers are computed again in the backward pass.")
        return bool(reasons)

    def _why(self, record: StageConfig, model: PeftModel) -> str:
        """Why a stage must, in words; empty where it fits."""
        room = int(USABLE * free_memory(self._trainer.args.device))
        try:
            needed = self.planned_memory(record, model)
        except Exception as error:  # a forward pass that asks for values, say; to compute again is always right
            return f"cannot be planned ({type(error).__name__}: {error})"
        return f"would take {needed / 1e9:.2f} GB of {room / 1e9:.2f} that are free" if needed > room else ""

    def planned_memory(self, record: StageConfig, model: PeftModel) -> int:
        """Return the bytes that training on a batch of the longest rows takes without checkpointing, with all that is
        in the device's memory of the whole base."""
        args, placement, (rows, _) = self._trainer.args, self._trainer.placement, self._trainer.client_rows()
        clients = self._batching.count(model)
        batch = -(-args.train_batch_size // (placement.count if placement.shares_batches else 1))
        batch = 1 if args.protects_records else batch * clients  # each row goes through the model alone
        length = padded(int(lengths_of(rows).max()))
        kept = self._submodels.activations(record, batch, length).everything
        adapter = sum(each.numel() for each in model.parameters() if each.requires_grad)
        copies = clients + 1 if clients > 1 else 1  # one more is what the stage's own engine has
        return training_memory(self._base_bytes(model), copies * adapter, kept)

    def _base_bytes(self, model: PeftModel) -> int:
        """Bytes of a submodel's frozen weights, and of what else of the base is on the device."""
        frozen = {id(each): stored_bytes(each) for each in model.parameters() if not each.requires_grad}
        device = self._trainer.args.device.type
        others = {
            id(each): stored_bytes(each)
            for each in self._base.parameters()
            if each.device.type == device and not is_stored(each)
        }
        return sum((others | frozen).values())
