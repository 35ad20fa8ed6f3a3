"""Activation checkpointing where a stage would not fit into memory without."""

import logging
from functools import cached_property

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from hf_devft.configuration import StageConfig
from hf_devft.models.layout import AdapterLayout
from hf_devft.models.streaming import empty_copy
from hf_devft.models.weights import is_stored
from hf_devft.run.client_batches import lengths_of
from hf_devft.run.peak_memory import SHARE, free_memory
from hf_devft.run.planned_submodels import PlannedSubmodels, training_memory
from hf_devft.trainer.client_batching import ClientBatching
from hf_devft.trainer.interface import FederatedTrainer


logger = logging.getLogger(__name__)


class Recomputation:
    """Has a stage's layers computed again in the backward pass, where `auto_activation_checkpointing` asks for it and
    what the stage is planned to take is more than the memory that there is.

    Args:
        trainer: whose clients' longest rows count.
        batching: how many clients share a batch.
        base: the whole model without adapter.
        peft_config: of the full-depth adapter.
    """

    def __init__(
        self, trainer: FederatedTrainer, batching: ClientBatching, base: PreTrainedModel, peft_config: PeftConfig
    ):
        self._trainer, self._batching = trainer, batching
        self._base, self._peft_config = base, peft_config

    @cached_property
    def _submodels(self) -> PlannedSubmodels:
        trainer = self._trainer
        return PlannedSubmodels(trainer.args, empty_copy(self._base), self._peft_config, trainer.kind)

    def settle(self, record: StageConfig, model: PeftModel) -> None:
        """Switch checkpointing on in a stage's submodel, in place, if it must be. As stages share their layers, it
        stays on in larger ones."""
        args, base = self._trainer.args, model.get_base_model()
        trains = self._trainer.remote_clients is None  # or clients do, each on its own device
        if not (args.auto_activation_checkpointing and trains) or base.is_activation_checkpointing:
            return
        needed, room = self.planned_memory(record, model), int(SHARE * free_memory(args.device))
        if needed <= room or not base.supports_gradient_checkpointing:
            return
        logger.info(
            f"stage {record.stage} would take {needed / 1e9:.2f} GB of {room / 1e9:.2f}: its layers are computed again"
            " in the backward pass"
        )
        options = dict(args.activation_checkpointing_kwargs or {})
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}  # as `Trainer`
        base.activation_checkpointing_enable(options or None, **own)

    def planned_memory(self, record: StageConfig, model: PeftModel) -> int:
        """Return the bytes that training on a batch of the longest rows takes without checkpointing, beside what the
        device holds of the base's other layers."""
        args, (rows, _) = self._trainer.args, self._trainer.client_rows()
        length = args.max_length
        if "input_ids" in (getattr(rows, "column_names", None) or []):
            length = 8 * -(-int(lengths_of(rows).max()) // 8)  # as the collator pads
        count = args.train_batch_size * self._batching.count(model)
        kept = self._submodels.activations(record, count, length).everything
        planned, base_bytes = self._submodels.model(record)
        own, device = {id(parameter) for parameter in model.parameters()}, args.device.type
        others = sum(
            each.nbytes
            for each in self._base.parameters()
            if id(each) not in own and each.device.type == device and not is_stored(each)
        )
        return training_memory(base_bytes + others, sum(AdapterLayout.of(planned).sizes), kept)
