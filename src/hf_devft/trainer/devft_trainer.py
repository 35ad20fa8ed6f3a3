"""`DevFTTrainer`: the mixin on `Trainer`, with loading by name, an adapter and encoded rows."""

import copy
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    DataCollatorForLanguageModeling,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_devft.configuration import DevFTConfig, Setup, check_compatibility
from hf_devft.embedded import resolve_model_name
from hf_devft.files import naming
from hf_devft.hub.download import fetch_adapter
from hf_devft.models.adapter import attach_adapter, new_adapter
from hf_devft.models.adapter_files import load_adapter
from hf_devft.models.gguf import check_unpacked, locate
from hf_devft.models.layout import State
from hf_devft.models.streaming import load_base, where_from
from hf_devft.models.supported import check_adapter
from hf_devft.tasks import TASKS, Encoding, Task, label_options, named_labels, task_of
from hf_devft.tasks.data import IGNORED, TAKEN_FOR_LABELS, first_rows, map_datasets
from hf_devft.tasks.generation import check_prompts
from hf_devft.trainer.mixin import DevFTMixin
from hf_devft.trainer.preparation import clients_of, prepare_peft_config, settle_arguments


logger = logging.getLogger(__name__)


class DevFTTrainer(DevFTMixin, Trainer):
    """Developmental federated tuning of a model with LoRA or IA3.

    Args:
        model: a model, a name or path for `from_pretrained` (whose layers are then read from the checkpoint only as
            stages need them, so that `trainer.model` can run from the first `train` or `evaluate` on), "embedded" for
            the small base that ships with the package, or a `PeftModel` whose adapter is the start.
        args: the run. What the model is for says `args.task`, else `task_type` of the adapter, else the model's class;
            a causal language model where none does.
        peft_config: of a new adapter, or the folder or Hub name of one to start from; not with a `PeftModel`.
        train_dataset: one dataset to partition, or {client: dataset}; encoded (`input_ids` and `labels`, say), or as
            docs/data.md shows for the task: prompt/completion, `messages`, `text` and `label`, ...
        eval_dataset: of the same form, held by the server.
        calibration_dataset: the server's own rows, of the same form; see `DevFTMixin`.
        processing_class: tokenizer, image processor, feature extractor or processor; loaded with the model where that
            is a name. A tokenizer without a padding token pads with its end of sequence.
        data_collator: default: the task's; text is padded to a multiple of 8.
        partitioner: any object with flwr-datasets' `Partitioner` interface, instead of `args.partition`.
        **kwargs: see `transformers.Trainer`.

    Raises:
        ValueError: see `DevFTMixin`; a model or tokenizer that does not fit the arguments.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        args: DevFTConfig,
        *,
        peft_config: PeftConfig | str | None = None,
        train_dataset: Dataset | dict[str, Dataset] | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        calibration_dataset: Dataset | None = None,
        processing_class: Any = None,
        data_collator: Callable | None = None,
        partitioner: Any = None,
        **kwargs,
    ):
        settle_arguments(args, kwargs)
        given = given_adapter(model, args, peft_config)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        args.task = task_of(
            None if isinstance(base, str) else base, getattr(given.config, "task_type", None), args.task
        )
        check_compatibility(Setup(args, adapter=given.config))
        if not isinstance(base, str):
            check_unpacked(base)
        task = TASKS[args.task]
        # The data first: a mistake in it is found before a large model is loaded.
        if isinstance(train_dataset, dict):  # clients may hold different formats
            train_dataset = map_datasets(train_dataset, functools.partial(_as_rows, task))
        clients = clients_of(args, train_dataset, partitioner)
        set_seed(args.seed)
        if isinstance(model, str):
            base, processing_class = _load(task, model, args, clients.dataset, given, processing_class)
            model = base
        model = _with_adapter(model, given)
        _settle_padding(processing_class, base.config)
        encoding = Encoding(processing_class, base.config, args.max_length, args.dataset_num_proc)
        self._encode = functools.partial(_encoded, task=task, encoding=encoding)
        if type(self).compute_loss is DevFTTrainer.compute_loss:
            _check_labels(clients.dataset, data_collator, args.label_names or [])

        def prepare(datasets: Any) -> Any:
            with args.main_process_first(desc="encoding of the rows"):  # the others read what it has cached
                return map_datasets(datasets, self._encode)

        eval_dataset = prepare(first_rows(eval_dataset, args.max_eval_samples))
        calibration_dataset = first_rows(calibration_dataset, args.calibration_samples)
        super().__init__(
            model,
            args,
            data_collator=data_collator or _collator(task, processing_class, base.config, args, kwargs),
            train_dataset=replace(clients, dataset=prepare(clients.dataset)),
            eval_dataset=eval_dataset,
            calibration_dataset=prepare(add_placeholder_answers(task, calibration_dataset, args)),
            processing_class=processing_class,
            initialisation=given.initialisation,
            **kwargs,
        )
        if not given.on_model:
            self.given_model = None  # the adapter is ours
        if args.predict_with_generate:
            map_datasets(self.eval_dataset, check_prompts)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As `Trainer`'s; encodes rows as the constructor does."""
        return super().get_eval_dataloader(self._encode(eval_dataset))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As `Trainer`'s; encodes rows as the constructor does."""
        return super().get_test_dataloader(self._encode(test_dataset))


def _collator(
    task: Task, processor: Any, config: PretrainedConfig, args: DevFTConfig, given: dict[str, Any]
) -> Callable | None:
    """A task's own collator.

    Raises:
        ValueError: a loss for which `Trainer` takes the labels out of a batch, of which an encoder-decoder makes what
            its decoder reads.
    """
    takes = "label_smoothing_factor" if args.label_smoothing_factor else None
    takes = takes if given.get("compute_loss_func") is None else "compute_loss_func"
    if takes is not None and config.is_encoder_decoder:
        raise ValueError(
            f"{takes} takes the labels out of a batch, and the decoder reads them: leave it out, or pass a "
            "`data_collator` that makes `decoder_input_ids`, such as `DataCollatorForSeq2Seq(tokenizer, model=model)`."
        )
    return task.collator(processor, config)


@dataclass(frozen=True)
class GivenAdapter:
    """The adapter that a trainer is given.

    Attributes:
        config: of it; None where there is none.
        state: its tensors, where it was read from a folder or the Hub.
        on_model: whether it is on the model already.
        initialisation: see `prepare_peft_config`.
        where: it was read from.
    """

    config: PeftConfig | None
    state: State | None = None
    on_model: bool = False
    initialisation: str | None = None
    where: str = ""


def given_adapter(model: Any, args: DevFTConfig, peft_config: PeftConfig | str | None) -> GivenAdapter:
    """Find out which adapter `model` and `peft_config` mean, and read it where it is in files.

    Raises:
        ValueError: there are two of them or none, or one that cannot be trained.
    """
    if model is None:
        raise ValueError("model is None: pass a model, or its name or path.")
    if isinstance(model, PeftModel):
        check_adapter(model.peft_config[model.active_adapter])
    if isinstance(model, PeftModel) == (peft_config is not None):
        raise ValueError(
            "pass `peft_config` with a plain model, and a `PeftModel` without it: there must be one adapter."
        )
    if isinstance(peft_config, str):
        config, state = load_adapter(fetch_adapter(peft_config, token=args.hub_token))
        return GivenAdapter(config, state, where=peft_config)
    if peft_config is not None:
        config, initialisation = prepare_peft_config(peft_config, args)
        return GivenAdapter(config, initialisation=initialisation)
    return GivenAdapter(model.peft_config[model.active_adapter], on_model=True)


def _with_adapter(model: Any, given: GivenAdapter) -> PeftModel:
    """Put the adapter on the model, a new one or that of a folder, unless it is there."""
    if given.on_model:
        return model
    if given.state is None:
        return new_adapter(model, train_missing_modules(given.config, model))
    _compare_bases(given.config, model)
    with naming(given.where):
        return attach_adapter(model, given.config, given.state)


def _settle_padding(processor: Any, config: PretrainedConfig) -> None:
    """Make a tokenizer without a padding token pad with its end of sequence, and tell classifiers by what; in
    place."""
    if getattr(processor, "pad_token", "") is None:
        processor.pad_token = processor.eos_token
    if config.is_encoder_decoder is False and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = getattr(processor, "pad_token_id", None)


def _load(
    task: Task, name: str, args: DevFTConfig, rows: Dataset, adapter: GivenAdapter, processor: Any
) -> tuple[PreTrainedModel, Any]:
    """Load the model and, unless given, what goes with it, of one name, at one revision.

    Args:
        rows: the clients', whose labels the model may be for.
    """
    options = args.model_init_kwargs or {}
    if task.classes is not None:
        options = with_labels(task, rows, name, options, args.is_private)
    path, options = locate(resolve_model_name(name), options)
    # Both look at the weights of every layer.
    whole = getattr(adapter.config, "use_dora", False) or adapter.initialisation is not None
    model = load_base(path, task.auto_class, args.stack, whole, **options)
    return model, processor or task.processor_class.from_pretrained(path, **where_from(options))


def train_missing_modules(config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """Copy an adapter's config so that modules that the checkpoint lacks (a pooler, say) are trained whole: whoever
    loads the adapter would have other random values there.

    Raises:
        ValueError: `exclude_modules` is a pattern, so that they cannot be added.
    """
    known = {"classifier", "score"} if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else set()
    known |= set(getattr(config, "modules_to_save", None) or [])
    missing: set[str] = getattr(model, "missing_modules", set())
    new = sorted(name for name in missing if not any(f".{own}." in f".{name}." for own in known))
    if not new:
        return config
    config = copy.deepcopy(config)
    config.modules_to_save = [*(config.modules_to_save or []), *new]
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        raise ValueError(f"the checkpoint lacks {', '.join(new)}: give `exclude_modules` as a list, with these.")
    config.exclude_modules = [*excluded, *new]
    return config


def _compare_bases(config: PeftConfig, model: PreTrainedModel) -> None:
    """Say that an adapter was made on another base, where it was. That is not loaded: whoever has written the adapter
    has chosen it, the user has chosen `model`."""
    old, new = config.base_model_name_or_path, model.config.name_or_path
    revision = getattr(model.config, "_commit_hash", None) if config.revision else None
    if old and (resolve_model_name(old), config.revision) != (resolve_model_name(new), revision):
        logger.warning(
            f"the adapter was made on {old}, and is put on {new or 'the given model'}: see `hf_devft.compare_bases` "
            "for how far they are from each other."
        )


# What models read; rows that have one of these are encoded.
_INPUTS = {"input_ids", "pixel_values", "input_features", "input_values"}


def _is_encoded(dataset: Dataset) -> bool:
    return not _INPUTS.isdisjoint(dataset.column_names)


def with_labels(task: Task, dataset: Dataset, name: str, options: dict[str, Any], is_private: bool) -> dict[str, Any]:
    """Add to a model's options the labels of these rows, unless they name labels, or the checkpoint has been trained
    on those of the rows.

    Args:
        is_private: whether the rows may not tell which labels there are.

    Raises:
        ValueError: labels that are no classes; or that only the rows tell, in a private run.
    """
    if "id2label" in options:
        names = {int(number): label for number, label in options["id2label"].items()}  # in JSON they are texts
        numbers = {label: number for number, label in names.items()}
        return {"num_labels": len(names), "label2id": numbers} | options | {"id2label": names}
    column = "labels" if _is_encoded(dataset) else task.classes
    dataset = dataset if _is_encoded(dataset) else task.to_columns(dataset)
    found, feature = label_options(dataset, column), dataset.features[column]
    path, where = locate(resolve_model_name(name), options)
    trained = AutoConfig.from_pretrained(path, **where_from(where))
    names, known = set(found["label2id"]), set(trained.id2label.values())
    if (trained.architectures or [""])[0] in task.model_names.values() and (
        names <= known or (all(map(str.isdigit, names)) and len(names) <= len(known))
    ):
        return options
    says_them = isinstance(getattr(feature, "feature", feature), ClassLabel)
    if is_private and not says_them and "num_labels" in options and all(map(str.isdigit, names)):
        return named_labels(list(map(str, range(options["num_labels"])))) | options
    if is_private and not says_them:
        raise ValueError(
            "the labels were found in the clients' rows, and would be published without noise: name them, as by "
            """`--model_init_kwargs '{"id2label": {"0": "no", "1": "yes"}}'` (numbers by `num_labels`), or let the """
            "column's type (ClassLabel)."
        )
    return found | options


def add_placeholder_answers(task: Task, rows: Any, args: DevFTConfig) -> Any:
    """Give the server's rows an answer that counts for nothing, where they have none and need none, as teaching only
    asks them."""
    only = args.asks_server_texts and args.grouping != "calibrated"  # which measures the loss of answers
    if not (only and isinstance(rows, Dataset)) or _is_encoded(rows):
        return rows
    names, count = set(rows.column_names), len(rows)
    if task.classes == "label" and names.isdisjoint(("label", "labels")):
        return rows.add_column("label", [IGNORED] * count)
    if task is TASKS["text-generation"] and "prompt" in names and names.isdisjoint(("completion", "text")):
        return rows.add_column("completion", [""] * count)
    return rows


def _as_rows(task: Task, dataset: Any) -> Any:
    """Convert one client's rows, as clients may hold different formats, before they are put together."""
    if not isinstance(dataset, Dataset) or _is_encoded(dataset) or not len(dataset):
        return dataset
    return task.to_columns(dataset)


def _check_labels(rows: Dataset, collator: Callable | None, names: list[str]) -> None:
    """Refuse rows that would have no labels, or be given them twice.

    Args:
        collator: the user's own. names: of columns that are labels, too.
    """
    if isinstance(collator, DataCollatorForLanguageModeling) and not _is_encoded(rows):
        raise ValueError(
            "DataCollatorForLanguageModeling makes labels, which rows of text are given here already: leave "
            "`data_collator` out, or pass rows of `input_ids` alone."
        )
    has_labels = not {"labels", *TAKEN_FOR_LABELS, *names}.isdisjoint(rows.column_names)
    if collator is None and _is_encoded(rows) and not has_labels:
        raise ValueError(
            f"the rows have {', '.join(sorted(_INPUTS.intersection(rows.column_names)))} but no `labels`: add them "
            "(-100 on what is not to be learned), or pass a `data_collator` that makes them."
        )


def _encoded(dataset: Any, task: Task, encoding: Encoding) -> Any:
    """Encode rows, unless they are, or are named."""
    if not isinstance(dataset, Dataset) or _is_encoded(dataset):
        return dataset
    if encoding.processor is None:
        raise ValueError(
            f"the dataset has columns {dataset.column_names}: pass what encodes them (a tokenizer, say) as "
            f"`processing_class`, or rows with one of {', '.join(sorted(_INPUTS))}, and `labels`."
        )
    return task.encode(task.to_columns(dataset), encoding)
