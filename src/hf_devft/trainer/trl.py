"""The federated part on TRL's trainers: supervised fine-tuning and direct preference optimisation.

TRL's own configs, data handling and losses; rounds, stages and artifacts are `DevFTMixin`'s.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import MethodType
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from peft import PeftModel

from hf_devft.configuration import DevFTConfig, Setup, check_compatibility
from hf_devft.embedded import resolve_model_name
from hf_devft.federation.partition import ClientData
from hf_devft.tasks.data import map_datasets
from hf_devft.tasks.generation import check_prompts
from hf_devft.trainer.mixin import DevFTMixin
from hf_devft.trainer.preparation import check_config, prepare_peft_config


try:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model
except ImportError as error:
    raise ImportError("TRL is not installed: pip install 'hf-devft[trl]', in a clone '.[trl]'") from error

# Tells whose a row is while TRL prepares it, as it may drop rows.
_ROW = "_row"


@dataclass
class DevFTSFTConfig(DevFTConfig, SFTConfig):
    """`DevFTConfig` and what only [`~trl.SFTConfig`] has; defaults of what both have are the former's."""

    _VALID_DICT_FIELDS = [*dict.fromkeys([*DevFTConfig._VALID_DICT_FIELDS, *SFTConfig._VALID_DICT_FIELDS])]


@dataclass
class DevFTDPOConfig(DevFTConfig, DPOConfig):
    """`DevFTConfig` and what only [`~trl.DPOConfig`] has; defaults of what both have are the former's."""


class TRLMixin(DevFTMixin):
    """What TRL's trainers need to train submodels of a model that they have patched.

    Raises:
        ValueError: see `DevFTMixin`; placements in which TRL's metrics, which every process adds up at every step,
            would wait for processes that train other clients.
    """

    # What its fused head computes; TRL says it in the trainer's `__init__`.
    fused_outputs: tuple[str, ...]

    def __init__(self, model: Any, args: DevFTConfig, **kwargs):
        check_config(args)
        adapter, initialisation = kwargs.get("peft_config"), None
        check_compatibility(Setup(args, trainer=self.kind, adapter=adapter))
        if adapter is not None:
            kwargs["peft_config"], initialisation = prepare_peft_config(adapter, args, self.kind)
        self._packs = getattr(args, "packing", False)
        # TRL and PEFT still read an alias that transformers 5 has renamed, at every step.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        base = resolve_model_name(model) if isinstance(model, str) else model
        if isinstance(base, str) and base.endswith(".gguf"):
            raise ValueError(
                f"TRL does not load {base}: pass the model, as `hf_devft.models.streaming.load_base` reads it."
            )
        super().__init__(base, args, initialisation=initialisation, **kwargs)
        if args.predict_with_generate:
            map_datasets(self.eval_dataset, check_prompts)

    def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
        """As TRL's; remembers whose rows are what became of the training set. Packing never mixes clients."""
        if hasattr(self, "_rows"):  # TRL prepares the training set first
            return super()._prepare_dataset(dataset, *rest)
        clients = self.clients
        if self._packs:
            prepare = super()._prepare_dataset
            parts = [prepare(dataset.select(rows), *rest) for rows in clients.rows.values()]
            ends = accumulate(map(len, parts), initial=0)
            self._rows = {name: np.arange(*span) for name, span in zip(clients.rows, pairwise(ends), strict=True)}
            return concatenate_datasets(parts)
        prepared = super()._prepare_dataset(dataset.add_column(_ROW, range(len(dataset))), *rest)
        places = {row: place for place, row in enumerate(prepared[_ROW][:])}
        self._rows = {
            name: np.array([places[row] for row in rows.tolist() if row in places], dtype=int)
            for name, rows in clients.rows.items()
        }
        return prepared.remove_columns(_ROW)

    def remap_client_rows(self, clients: ClientData) -> ClientData:
        rows = getattr(self, "_rows", clients.rows)  # TRL can be told to leave them as they are
        return replace(clients, dataset=self.train_dataset, rows=rows)

    def prepare_model_in_use(self, model: PeftModel) -> None:
        # TRL has patched the base's `forward`; a submodel's copy of that would run the base.
        base = model.get_base_model()
        vars(base).pop("forward", None)
        add_fused_lm_head(base, outputs=self.fused_outputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, which adds its metrics of the clients' rows, but not in a private run: no noise covers them."""
        if self.args.is_private:
            self._metrics["train"].clear()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        """As TRL's, whose own metrics are among the output's, so that stages record them."""
        self._metrics["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.is_private:
            self._metrics["eval"].pop("num_tokens", None)  # of the rows that were trained on
        for name, values in self._metrics["eval"].items():
            output.metrics[f"{metric_key_prefix}_{name}"] = float(np.mean(values))
        self._metrics["eval"].clear()
        return output


class DevFTSFTTrainer(TRLMixin, SFTTrainer):
    """Developmental federated tuning with TRL's supervised fine-tuning: its data formats, losses and packing.

        DevFTSFTTrainer("Qwen/Qwen3-0.6B", DevFTSFTConfig("out", packing=True, packing_strategy="wrapped"), ...)

    Args:
        model, args, train_dataset, eval_dataset, partitioner, calibration_dataset: as for `DevFTMixin`; rows as TRL
            takes them.
        **kwargs: see `trl.SFTTrainer`.
    """

    kind = "sft"
    fused_outputs = ("log_probs", "entropy", "is_top1")


class DevFTDPOTrainer(TRLMixin, DPOTrainer):
    """Developmental federated tuning with TRL's direct preference optimisation. A stage's reference is its own
    submodel without the adapter.

    Args:
        model, args, train_dataset, eval_dataset, partitioner, calibration_dataset: as for `DevFTMixin`; rows as TRL
            takes them (`prompt`, `chosen`, `rejected`).
        **kwargs: see `trl.DPOTrainer`.

    Raises:
        ValueError: options that need one reference for all stages, or cut a batch of pairs.
    """

    kind = "dpo"

    @property
    def fused_outputs(self) -> tuple[str, ...]:
        weighting = ("log_sum_sq_probs",) if self.args.use_weighting else ()
        return ("log_probs", "entropy", "mean_logits", "is_top1", *weighting)

    def __init__(self, model: Any, args: DevFTDPOConfig, **kwargs):
        if kwargs.get("ref_model") is not None or args.precompute_ref_log_probs or isinstance(model, PeftModel):
            raise ValueError(
                "ref_model, precompute_ref_log_probs and a model with an adapter are for one reference of full depth, "
                "but each stage has its own, the submodel without adapter: leave them out, and pass `peft_config`."
            )
        super().__init__(model, args, **kwargs)

    def prepare_model_in_use(self, model: PeftModel) -> None:
        super().prepare_model_in_use(model)
        if self.args.disable_dropout:  # which TRL has done for its own model alone
            disable_dropout_in_model(model)
        model.disable_adapter = MethodType(_without_adapter, model)


@contextmanager
def _without_adapter(model: PeftModel) -> Iterator[None]:
    """PEFT's `disable_adapter`, which afterwards would train all of the adapter, what a method has frozen, too."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with PeftModel.disable_adapter(model):
        yield
    for parameter, is_trained in trained:
        parameter.requires_grad_(is_trained)
