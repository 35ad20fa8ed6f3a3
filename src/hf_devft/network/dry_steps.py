"""How many layers a machine can train: measured by a step with one layer and one with two, on its longest rows."""

import tempfile
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from hf_devft.network.settings import OWN_OPTIONS, read_settings
from hf_devft.run.peak_memory import USABLE, free_memory
from hf_devft.trainer.devft_trainer import DevFTTrainer


def measure_layers(model: str, settings: str, rows: Dataset, options: dict[str, Any]) -> int:
    """Return most layers that this machine can train as a server asks; 0 where all of them fit.

    Args:
        model: the base, as for `DevFTTrainer`. settings: the server's, see `shared_settings`.
        rows: the client's. options: of its own `DevFTConfig`, such as `use_cpu`.

    Raises:
        ValueError: settings or rows that cannot be trained with.
    """
    with tempfile.TemporaryDirectory() as folder:
        dry = {
            "output_dir": folder, "initial_layers": 1, "growth_factor": 2.0, "stage_rounds": 1, "local_steps": 1,
            "grouping": "even", "federated_method": "fedit", "federated_method_kwargs": None,
        }  # fmt: skip
        args, adapter = read_settings(settings, OWN_OPTIONS | dry | options)
        room = free_memory(args.device)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        longest = rows.select(sorted(range(len(rows)), key=lambda index: -len(str(rows[index])))[:batch])
        trainer = DevFTTrainer(
            model, args, peft_config=adapter, train_dataset=longest, callbacks=[StopAfterTwoRounds()]
        )
        if trainer.model.get_base_model().supports_gradient_checkpointing:  # as where memory is short
            args.activation_checkpointing |= args.auto_activation_checkpointing
        trainer.train()
        peaks = [record.peak_memory for record in trainer.ledger.rounds]
        return layers_that_fit(peaks, USABLE * room, trainer.stages[-1].full_layers)


def layers_that_fit(peaks: list[int], room: float, depth: int) -> int:
    """Return how many layers fit into `room` bytes, at least one; 0 where all `depth` do.

    Args:
        peaks: bytes with one layer and with two; a layer more takes what the second one took.
    """
    if len(peaks) < 2 or peaks[1] <= peaks[0]:  # a layer is too small to be seen
        return 0
    one_more = peaks[1] - peaks[0]
    fit = int((room - peaks[0]) // one_more) + 1
    return 0 if fit >= depth else max(fit, 1)


class StopAfterTwoRounds(TrainerCallback):
    """Ends a run after its second round."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2
