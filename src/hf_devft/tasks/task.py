"""What differs between tasks: the model's head, what rows look like, how they become a batch, what is measured.

Tasks have the names of transformers' pipelines. A new one is one entry in `TASKS`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral
from typing import Any

import torch
from datasets import Audio, ClassLabel, Dataset, List
from peft import TaskType
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    default_data_collator,
)
from transformers.models.auto import modeling_auto

from hf_devft.embedded import EMBEDDED
from hf_devft.tasks.data import (
    IGNORED,
    PAD_TO,
    TAKEN_FOR_LABELS,
    RowError,
    refuse_missing,
    to_known_columns,
    tokenize,
)
from hf_devft.tasks.predictions import (
    ClassificationMetrics,
    argmax_logits,
    language_model_metrics,
    reduce_logits,
)


@dataclass(frozen=True)
class Encoding:
    """What rows are encoded with.

    Attributes:
        processor: tokenizer, image processor, feature extractor, or a processor of several.
        config: the model's.
        max_length: of a row, in tokens; num_proc: processes that share the work.
        class_names: of the numbers in the rows' column of labels, where it says them and the model has all of them.
    """

    processor: Any
    config: PretrainedConfig
    max_length: int
    num_proc: int | None = None
    class_names: tuple[str, ...] = ()

    def map(self, dataset: Dataset, encode: Callable, **options: Any) -> Dataset:
        """`encode(rows, encoding)` of all rows, cached. A raw `label` goes, which a `Trainer` would take for the
        encoded one."""
        options["remove_columns"] = [name for name in TAKEN_FOR_LABELS if name in dataset.column_names]
        encoding = replace(self, class_names=_class_names(dataset, self.config))
        return dataset.map(
            encode, fn_kwargs={"encoding": encoding}, num_proc=self.num_proc, desc="Encoding", **options
        )


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        auto_class, processor_class: what loads its models and what goes with them.
        model_names: transformers' classes for it.
        peft_type: PEFT's name of it, where there is one.
        to_columns: (rows as the user has them) -> rows as `encode` reads them; raises ValueError.
        encode: (rows, encoding) -> rows as the model reads them, with `labels`.
        collator: (processor, model's config) -> what makes a batch of rows.
        head: modules that are trained whole, where PEFT does not know them.
        classes: column of the label, where there is a fixed set of them.
        compute_metrics, preprocess_logits: for `Trainer`.
    """

    auto_class: type
    processor_class: type
    model_names: dict
    peft_type: TaskType | None
    to_columns: Callable[[Dataset], Dataset]
    encode: Callable[[Dataset, Encoding], Dataset]
    collator: Callable[[Any, PretrainedConfig], Callable | None]
    head: list[str] | None = None
    classes: str | None = None
    compute_metrics: Callable = field(default_factory=ClassificationMetrics)
    preprocess_logits: Callable = argmax_logits

    def snippet(self, base: str | None, labels: list[str] | None) -> tuple[str, str]:
        """Python that loads an adapter of this task from LOCATION with PEFT: imports, and the rest."""
        auto, processor = self.auto_class.__name__, self.processor_class.__name__
        options = f", id2label={dict(enumerate(labels))}, ignore_mismatched_sizes=True" if labels else ""
        name = "tokenizer" if self.processor_class is AutoTokenizer else "processor"
        last = f"{name} = {processor}.from_pretrained(LOCATION)"
        folder, _, file = (base or "").rpartition("/")
        if base == EMBEDDED:  # whose folder is another one on each machine
            imports = "from hf_devft.embedded import BASE_PATH\nfrom peft import PeftModel\n"
            imports += f"from transformers import {auto}, {processor}"
            load = f"model = PeftModel.from_pretrained({auto}.from_pretrained(BASE_PATH{options}), LOCATION)"
            return imports, f"{load}\n{last}"
        if self.peft_type is not None and not file.endswith(".gguf"):
            peft = auto.replace("AutoModel", "AutoPeftModel")
            imports = f"from peft import {peft}\nfrom transformers import {processor}"
            return imports, f"model = {peft}.from_pretrained(LOCATION{options})\n{last}"
        names = [auto, processor]
        if file.endswith(".gguf"):
            base, names = folder, [*names, "GgufConfig"]
            options += f', gguf_file="{file}", quantization_config=GgufConfig(dequantize=True)'
        imports = f"from peft import PeftModel\nfrom transformers import {', '.join(names)}"
        load = f'base = {auto}.from_pretrained("{base}"{options})\nmodel = PeftModel.from_pretrained(base, LOCATION)'
        return imports, f"{load}\n{last}"


def _columns(*wanted: tuple[str, ...]) -> Callable[[Dataset], Dataset]:
    """Rows with these columns, each by the first of its names that is there, renamed to the first."""

    def to_columns(dataset: Dataset) -> Dataset:
        for names in wanted:
            found = [name for name in names if name in dataset.column_names]
            if not found:
                raise ValueError(f"the dataset has columns {dataset.column_names}, but needs {' or '.join(names)}.")
            refuse_missing(dataset, found[:1])
            if found[0] != names[0]:
                dataset = dataset.rename_column(found[0], names[0])
        return dataset

    return to_columns


def _prompt_and_completion(dataset: Dataset) -> Dataset:
    dataset = to_known_columns(dataset)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"the dataset has columns {dataset.column_names}, but this task needs prompt and answer.")
    return dataset


_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"))


def _text_and_label(dataset: Dataset) -> Dataset:
    """One text or two (GLUE's names) and a label."""
    for first, second in _PAIRS:
        if {first, second} <= set(dataset.column_names):
            dataset = dataset.rename_columns({first: "text", second: "text_pair"})
    return _columns(("text", "sentence", "content"), ("label", "labels"))(dataset)


def label_options(dataset: Dataset, column: str) -> dict[str, Any]:
    """The `num_labels`, `id2label` and `label2id` of a model for the labels in a column: of classes that it names, of
    texts in alphabetical order, or of numbers from 0 on.

    Raises:
        ValueError: labels that are neither.
    """
    feature = dataset.features[column]
    by_word = isinstance(feature, List)
    feature = feature.feature if by_word else feature
    if isinstance(feature, ClassLabel):
        names = feature.names
    else:
        values = dataset[column][:]
        known = set(chain.from_iterable(values) if by_word else values) - {None, IGNORED}
        kinds = {type(value) for value in known}
        if not (kinds == {str} or (kinds and kinds <= {int, bool} and min(known) >= 0)):
            given = " and ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
            raise ValueError(
                f"column {column!r} holds {given}: labels are classes, named by texts or numbered from 0 on."
            )
        names = sorted(known) if kinds == {str} else list(range(max(known) + 1))
    return named_labels(list(map(str, names)))


def named_labels(names: Sequence[str]) -> dict[str, Any]:
    """The options of a model for classes of these names, in their order."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _class_names(dataset: Dataset, config: PretrainedConfig) -> tuple[str, ...]:
    """The names of the classes in a column of labels, which a trained head may number otherwise."""
    kinds = [dataset.features[name] for name in ("label", "tags") if name in dataset.features]
    kinds = [getattr(kind, "feature", kind) for kind in kinds]
    names = next((tuple(kind.names) for kind in kinds if isinstance(kind, ClassLabel)), ())
    return names if set(names) <= set(config.id2label.values()) else ()


def _class_finder(encoding: Encoding) -> Callable[[int | str], int]:
    """A label's name, or number in its column -> the number of its class."""
    config, names = encoding.config, encoding.class_names
    numbers = {name: number for number, name in config.id2label.items()}

    def class_of(label: int | str) -> int:
        if isinstance(label, Integral) and 0 <= label < len(names):
            label = names[label]
        number = numbers.get(label) if isinstance(label, str) else label
        if not isinstance(number, Integral) or not (number == IGNORED or 0 <= number < config.num_labels):
            raise RowError(
                f"{label!r} is not one of the model's {config.num_labels} labels ({', '.join(numbers)}): load the "
                "model with `num_labels`, or by name."
            )
        return int(number)

    return class_of


def _encode_text_and_label(rows: dict[str, list], encoding: Encoding) -> dict[str, list]:
    texts = (rows["text"], rows["text_pair"]) if "text_pair" in rows else (rows["text"],)
    encoded = encoding.processor(*texts, truncation=True, max_length=encoding.max_length)
    return {**encoded, "labels": list(map(_class_finder(encoding), rows["label"]))}


def _encode_tags(rows: dict[str, list], encoding: Encoding) -> dict[str, list]:
    """Each word's first token carries its tag."""
    encoded = encoding.processor(
        rows["tokens"], is_split_into_words=True, truncation=True, max_length=encoding.max_length
    )
    labels, class_of = [], _class_finder(encoding)
    for row, tags in enumerate(rows["tags"]):
        words = encoded.word_ids(row)
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels.append(
            [class_of(tags[word]) if is_first else IGNORED for word, is_first in zip(words, first, strict=True)]
        )
    return {**encoded, "labels": labels}


def _encode_text_to_text(rows: dict[str, list], encoding: Encoding) -> dict[str, list]:
    cut = {"truncation": True, "max_length": encoding.max_length}
    encoded = encoding.processor(rows["prompt"], **cut)
    return {**encoded, "labels": encoding.processor(text_target=rows["completion"], **cut).input_ids}


def _encode_image(rows: dict[str, list], encoding: Encoding) -> dict[str, list]:
    images = [image.convert("RGB") for image in rows["image"]]
    pixels = encoding.processor(images, return_tensors="np").pixel_values
    return {"pixel_values": pixels, "labels": list(map(_class_finder(encoding), rows["label"]))}


def _extractor(processor: Any) -> Any:
    return getattr(processor, "feature_extractor", processor)


def _encode_sound(row: dict[str, Any], encoding: Encoding) -> dict[str, Any]:
    sound, extractor = row["audio"], _extractor(encoding.processor)
    most = getattr(extractor, "n_samples", math.inf)  # Whisper's 30 seconds, beyond which nothing is heard
    if "label" not in row and len(sound["array"]) > most:
        raise RowError(
            f"a sound of {len(sound['array']) / sound['sampling_rate']:.0f} seconds is longer than the "
            f"{most / sound['sampling_rate']:.0f} that the model hears of it: leave it out, or cut it and its text."
        )
    features = extractor(sound["array"], sampling_rate=sound["sampling_rate"], return_tensors="np")
    name = extractor.model_input_names[0]
    encoded = {name: features[name][0]}
    if "label" in row:
        return encoded | {"labels": _class_finder(encoding)(row["label"])}
    text = encoding.processor.tokenizer(row["text"], truncation=True, max_length=encoding.max_length)
    return encoded | {"labels": text.input_ids}


def _encode_sounds(dataset: Dataset, encoding: Encoding) -> Dataset:
    if isinstance(dataset.features["audio"], Audio):  # decoded at the rate that the model was trained with
        dataset = dataset.cast_column("audio", Audio(sampling_rate=_extractor(encoding.processor).sampling_rate))
    return encoding.map(dataset, _encode_sound)


@dataclass(frozen=True)
class SoundCollator:
    """Pads sound, and labels that are tokens with -100.

    Attributes:
        processor: feature extractor, or a processor with one and a tokenizer.
        start: the token that the model puts before the labels by itself.
    """

    processor: Any
    start: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        extractor = _extractor(self.processor)
        name = extractor.model_input_names[0]
        batch = dict(extractor.pad([{name: row[name]} for row in rows], return_tensors="pt"))
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        if labels[0].dim() == 0:
            return batch | {"labels": torch.stack(labels)}
        labels = [own[1:] if len(own) and own[0] == self.start else own for own in labels]
        return batch | {"labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)}


def _sound_collator(processor: Any, config: PretrainedConfig) -> SoundCollator | None:
    return None if processor is None else SoundCollator(processor, getattr(config, "decoder_start_token_id", None))


def _padding(collator: type) -> Callable[[Any, PretrainedConfig], Callable | None]:
    """To a multiple of `PAD_TO`, by a tokenizer; `Trainer`'s default without one."""
    return lambda tokenizer, config: None if tokenizer is None else collator(tokenizer, pad_to_multiple_of=PAD_TO)


def _batched(encode: Callable) -> Callable[[Dataset, Encoding], Dataset]:
    return lambda dataset, encoding: encoding.map(dataset, encode, batched=True)


DEFAULT_TASK = "text-generation"
TASKS: dict[str, Task] = {
    "text-generation": Task(
        auto_class=AutoModelForCausalLM,
        processor_class=AutoTokenizer,
        model_names=modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        peft_type=TaskType.CAUSAL_LM,
        to_columns=to_known_columns,
        encode=lambda dataset, encoding: tokenize(
            dataset, encoding.processor, encoding.max_length, encoding.num_proc
        ),
        collator=_padding(DataCollatorForSeq2Seq),
        compute_metrics=language_model_metrics,
        preprocess_logits=reduce_logits,
    ),
    "text2text-generation": Task(
        auto_class=AutoModelForSeq2SeqLM,
        processor_class=AutoTokenizer,
        model_names=modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        peft_type=TaskType.SEQ_2_SEQ_LM,
        to_columns=_prompt_and_completion,
        encode=_batched(_encode_text_to_text),
        collator=_padding(DataCollatorForSeq2Seq),
        compute_metrics=ClassificationMetrics(f1=False),
    ),
    "text-classification": Task(
        auto_class=AutoModelForSequenceClassification,
        processor_class=AutoTokenizer,
        model_names=modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        peft_type=TaskType.SEQ_CLS,
        to_columns=_text_and_label,
        encode=_batched(_encode_text_and_label),
        collator=_padding(DataCollatorWithPadding),
        classes="label",
    ),
    "token-classification": Task(
        auto_class=AutoModelForTokenClassification,
        processor_class=AutoTokenizer,
        model_names=modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        peft_type=TaskType.TOKEN_CLS,
        to_columns=_columns(("tokens", "words"), ("tags", "ner_tags", "pos_tags", "labels")),
        encode=_batched(_encode_tags),
        collator=_padding(DataCollatorForTokenClassification),
        classes="tags",
    ),
    "image-classification": Task(
        auto_class=AutoModelForImageClassification,
        processor_class=AutoImageProcessor,
        model_names=modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        peft_type=None,
        to_columns=_columns(("image", "img"), ("label", "labels", "fine_label")),
        encode=lambda dataset, encoding: encoding.map(dataset, _encode_image, batched=True, batch_size=32),
        collator=lambda processor, config: default_data_collator,
        head=["classifier"],
        classes="label",
    ),
    "audio-classification": Task(
        auto_class=AutoModelForAudioClassification,
        processor_class=AutoFeatureExtractor,
        model_names=modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        peft_type=None,
        to_columns=_columns(("audio",), ("label", "labels")),
        encode=_encode_sounds,
        collator=_sound_collator,
        head=["projector", "classifier"],
        classes="label",
    ),
    "automatic-speech-recognition": Task(
        auto_class=AutoModelForSpeechSeq2Seq,
        processor_class=AutoProcessor,
        model_names=modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        peft_type=None,
        to_columns=_columns(("audio",), ("text", "sentence", "transcription")),
        encode=_encode_sounds,
        collator=_sound_collator,
        compute_metrics=ClassificationMetrics(f1=False),
    ),
}  # fmt: skip


def task_named(name: str | None) -> Task:
    """The task of this name; None is what commands take without one."""
    return TASKS[name or DEFAULT_TASK]


def task_of(model: PreTrainedModel | None, peft_type: TaskType | str | None, name: str | None = None) -> str:
    """The name of the task that is named, that PEFT names, or that a model's class is for; else "text-generation".

    Raises:
        ValueError: PEFT names a task that is not supported.
    """
    if name is not None:
        return name
    own = type(model).__name__
    if peft_type is not None and peft_type not in [task.peft_type for task in TASKS.values()]:
        raise ValueError(f"task_type={peft_type!r} is not supported: use one of {', '.join(TASKS)} by `task`.")
    return next(
        (
            name
            for name, task in TASKS.items()
            if (peft_type is not None and task.peft_type == peft_type)
            or (peft_type is None and model is not None and own in task.model_names.values())
        ),
        DEFAULT_TASK,
    )


def answers_prompts(task: str | None) -> bool:
    """Whether a task's rows are prompts and answers; None is of a trainer that does not say, a language model's."""
    return task in (None, DEFAULT_TASK)
