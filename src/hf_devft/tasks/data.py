"""Rows of text -> token ids with labels on what is to be learned; and the files that rows come from."""

import glob
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.utils import logging as datasets_logging
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# Label of a token (or row) that is not learned and does not count: PyTorch's `ignore_index`.
IGNORED = -100
# Collators pad to a multiple of this, in which GPUs multiply fast.
PAD_TO = 8
# Column of how many turns of a chat are its prompt, of which none is learned.
_PROMPT_TURNS = "prompt_turns"
_OPTIONS = "chat_template_kwargs"  # as TRL has it
# Columns that `Trainer` takes for encoded labels, whatever is in them.
TAKEN_FOR_LABELS = ("label", "label_ids")


class RowError(ValueError):
    """An error whose text quotes rows, and is for their owner alone."""


def instruction_prompt(instruction: str, context: str | None = None) -> str:
    """Word an instruction, with what it is about, as a model is asked."""
    given = f"\n\n### Input:\n{context}" if context else ""
    return f"### Instruction:\n{instruction}{given}\n\n### Response:\n"


def _from_instruction(row: dict, answer: str) -> dict[str, str]:
    about = row.get("input") or _context(row)
    return {"prompt": instruction_prompt(row["instruction"], about), "completion": row[answer]}


def _context(row: dict) -> str:
    """What an instruction or a question is about; lists of passages, as some sets have them, are not read."""
    return context if isinstance(context := row.get("context"), str) else ""


def _from_question(row: dict, answer: str) -> dict[str, str]:
    about = f"{context}\n\n" if (context := _context(row)) else ""
    return {"prompt": f"{about}Question: {row['question']}\nAnswer:", "completion": f" {row[answer]}"}


def _from_conversations(row: dict, answer: str) -> dict[str, list]:
    """ShareGPT's names for what chat templates call role and content, which it may have, too."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = [
        (turn["from"], turn["value"]) if turn.get("from") is not None else (turn.get("role"), turn.get("content"))
        for turn in row[answer]
    ]
    return {"messages": [{"role": roles.get(role, role), "content": content} for role, content in turns]}


def _from_chat_prompt(row: dict, answer: str) -> dict[str, Any]:
    return {"messages": [*row["prompt"], *row[answer]], _PROMPT_TURNS: len(row["prompt"])}


# (columns that must be there) -> how to make one of the first three formats of them; the last column is the answer.
_FORMATS = {
    ("messages",): None,
    ("prompt", "completion"): None,
    ("conversations",): _from_conversations,
    ("instruction", "output"): _from_instruction,
    ("instruction", "response"): _from_instruction,
    ("question", "answer"): _from_question,
    ("text",): None,
}


def to_known_columns(dataset: Dataset) -> Dataset:
    """Convert rows to a column `messages` (chat), columns `prompt` and `completion`, or `text` (all of it is learned).

    Made from these, or from ShareGPT's `conversations`, instruction/(input or context)/output or response, and
    (context)/question/answer; prompt and completion may be messages, too. Numbers become text. Other columns are kept.

    Raises:
        ValueError: none of these, or a row without its text.
    """
    for columns, convert in _FORMATS.items():
        if not set(columns) <= set(dataset.column_names):
            continue
        refuse_missing(dataset, columns)
        if columns == ("prompt", "completion") and len(dataset) and isinstance(dataset[0]["prompt"], list):
            convert = _from_chat_prompt
        dataset = _numbers_as_text(dataset, columns)
        if convert is None:
            return dataset
        return dataset.map(convert, fn_kwargs={"answer": columns[-1]}, desc="Formatting")
    known = ", ".join("/".join(columns) for columns in _FORMATS)
    only = dataset.column_names[0] if len(dataset.column_names) == 1 else ""
    hint = " Are its fields separated by semicolons? Save it with commas." if ";" in only else ""
    raise ValueError(f"the dataset has columns {dataset.column_names}, but needs one of: {known}.{hint}")


def _numbers_as_text(dataset: Dataset, columns: Sequence[str]) -> Dataset:
    """Cast what a file has as numbers: answers of sums.

    Raises:
        ValueError: JSON's dates, whose text is lost.
    """
    kinds = {name: dataset.features[name] for name in columns}
    if dates := [name for name, kind in kinds.items() if isinstance(kind, Value) and "timestamp" in kind.dtype]:
        raise ValueError(
            f"{', '.join(dates)} of the data is read as dates, which as text would be others than those written: give "
            "the rows as CSV, or make texts of them."
        )
    text = ("string", "large_string", "null")
    return _as_text(
        dataset, [name for name, kind in kinds.items() if isinstance(kind, Value) and kind.dtype not in text]
    )


def _as_text(dataset: Dataset, columns: Sequence[str]) -> Dataset:
    features = Features({**dataset.features, **dict.fromkeys(columns, Value("string"))})
    return dataset.cast(features) if columns else dataset


def refuse_missing(dataset: Dataset, columns: Sequence[str]) -> None:
    """Refuse a row that has nothing in one of these columns, as far as they are there.

    Raises:
        ValueError: says which.
    """
    for column in columns:
        if column not in dataset.column_names or not dataset.data.column(column).null_count:
            continue
        if (row := next((index for index, value in enumerate(dataset[column], 1) if value is None), None)) is not None:
            raise ValueError(f"row {row} of the data has no `{column}`: fill it in, or leave that row out.")


def unconverted(dataset: Dataset) -> Dataset:
    """Rows for TRL, which converts them by itself.

    Raises:
        ValueError: a row without a text that TRL would read.
    """
    if "messages" in dataset.column_names:
        return dataset
    with_prompt = "prompt" in dataset.column_names
    refuse_missing(dataset, ("prompt", "completion") if with_prompt else ("text",))
    refuse_missing(dataset, ("chosen", "rejected"))
    return dataset


def _text(cell: str) -> str | None:
    """A cell of a CSV file as it is written; None where it is empty."""
    return cell or None


# So that True, 007 and NA stay what they are where they are texts.
_TEXTS = {name for columns in _FORMATS for name in columns} | {
    "input", "context", "chosen", "rejected", "sentence", "sentence1", "sentence2", "premise", "hypothesis",
    "question1", "question2", "content", "transcription",
}  # fmt: skip
_AS_WRITTEN = {"keep_default_na": False, "na_values": [""], "converters": dict.fromkeys(sorted(_TEXTS), _text)}
# Ending of a file's name -> (builder of `datasets`, its options).
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}), ".jsonl": ("json", {}), ".csv": ("csv", _AS_WRITTEN),
    ".tsv": ("csv", {"sep": "\t", **_AS_WRITTEN}), ".parquet": ("parquet", {}), ".txt": ("text", {}),
}  # fmt: skip


# The column that says which file, or dataset, of several a row is from.
SOURCE = "source"


def check_files(files: Sequence[str | Path]) -> None:
    """Refuse files that `load_files` cannot read by what they are called, or that hold nothing.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: an unknown ending, an empty file, or one that is given twice.
    """
    for path in map(Path, files):
        if not path.is_file():
            hint = " Separate them by spaces." if "," in str(path) else ""
            raise FileNotFoundError(f"{path} is not a file: give the paths of {', '.join(_BUILDERS)} files.{hint}")
        if path.suffix not in _BUILDERS:
            raise ValueError(f"{path} ends in {path.suffix!r}: known are {', '.join(_BUILDERS)}.")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty: give a file with a row or more.")
    whole = [Path(file).resolve() for file in files]
    if twice := next((path for path in whole if whole.count(path) > 1), None):
        raise ValueError(f"{twice} is given twice: leave one out.")


def load_files(files: Sequence[str | Path], to_columns: Callable[[Dataset], Dataset] = to_known_columns) -> Dataset:
    """Read local JSON, JSONL, CSV, TSV, Parquet or text files (a row a line) as one dataset with a column `source`:
    the file's stem, or its path below the folder of all where two have one stem. Columns are kept where every file has
    them, once `to_columns` has made what a task reads.

    Raises:
        FileNotFoundError, ValueError: see `check_files`; unknown columns, unreadable files, rows without their text,
            or files of which no column is common to all.
    """
    check_files(files)
    datasets = {}
    for path in map(Path, files):
        builder, options = _BUILDERS[path.suffix]
        try:
            with _saying_nothing():
                datasets[str(path)] = load_dataset(
                    builder, data_files=glob.escape(str(path)), split="train", **options
                )
        except Exception as error:
            why = (path.suffix == ".jsonl" and _broken_line(path)) or error.__cause__ or error
            why = f"{why}: save it as UTF-8" if isinstance(why, UnicodeDecodeError) else why
            raise ValueError(f"{path} could not be read as {builder.upper()}: {why}") from error
    return _joined(datasets, to_columns)


@contextmanager
def _saying_nothing() -> Iterator[None]:
    """Within this context `datasets` does not log what it raises, too."""
    before = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(before)


def _broken_line(path: Path) -> str | None:
    """What is wrong with the first line that is no JSON object, where there is one."""
    with path.open(errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is no JSON object"
            except ValueError as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else error
                return f"line {number} is no JSON: {what}"
    return None


def load_datasets(
    names: Sequence[str],
    config: str | None = None,
    split: str = "train",
    to_columns: Callable[[Dataset], Dataset] = to_known_columns,
) -> Dataset:
    """Read datasets on the Hub or in local folders as one, as `load_files` does.

    Raises:
        ValueError: see `load_files`; no such dataset, configuration or split.
    """
    datasets = {}
    for name in names:
        try:
            datasets[name] = load_dataset(name, config, split=split)
        except Exception as error:
            raise ValueError(f"the dataset {name!r} could not be read: {error.__cause__ or error}") from error
    return _joined(datasets, to_columns)


def _joined(datasets: dict[str, Dataset], to_columns: Callable[[Dataset], Dataset]) -> Dataset:
    """One dataset of all, with where each row is from as `source`; a single one keeps a column of that name."""
    converted = {}
    for (name, dataset), source in zip(datasets.items(), _sources(list(datasets)), strict=True):
        try:
            dataset = to_columns(dataset)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if SOURCE in dataset.column_names and len(datasets) > 1:
            logger.warning(f"{name} has a column {SOURCE!r}, which names the file here: rename it if you need it.")
            dataset = dataset.remove_columns(SOURCE)
        if SOURCE not in dataset.column_names:
            dataset = dataset.add_column(SOURCE, [source] * len(dataset))
        converted[name] = dataset
    if any(_PROMPT_TURNS in rows.column_names for rows in converted.values()):  # other chats have none of a prompt
        converted = {name: _with_prompt_turns(rows) for name, rows in converted.items()}
    first, *others = converted
    shared = list(converted[first].column_names)
    for name in others:
        columns = converted[name].column_names
        shared = [column for column in shared if column in columns]
        if shared == [SOURCE]:
            had, has = (datasets[each].column_names for each in (first, name))
            raise ValueError(
                f"{first} has the columns {had}, {name} has {has}, which are two formats: convert them to one."
            )
    return concatenate_datasets(_aligned([dataset.select_columns(shared) for dataset in converted.values()]))


def _with_prompt_turns(rows: Dataset) -> Dataset:
    return rows if _PROMPT_TURNS in rows.column_names else rows.add_column(_PROMPT_TURNS, [0] * len(rows))


def _sources(names: Sequence[str]) -> list[str]:
    """What each is called among them."""
    stems = [Path(name).stem for name in names]
    if len(set(stems)) == len(stems):
        return stems
    paths = list(map(os.path.abspath, names))
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]


def _aligned(datasets: list[Dataset]) -> list[Dataset]:
    """Datasets of the same columns, with text where their types differ: files are read with types of their own."""
    text = [
        name
        for name, kind in datasets[0].features.items()
        if isinstance(kind, Value) and any(dataset.features[name] != kind for dataset in datasets)
    ]
    return [_as_text(dataset, text) for dataset in datasets]


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, max_length: int, num_proc: int | None = None
) -> Dataset:
    """Add `input_ids` and `labels`, which are -100 on what is not to be learned.

    Learned are the completion with the end of sequence, the assistant's turns of a chat (but for those of a prompt
    that is messages), or a whole text. Columns `tools` and `chat_template_kwargs` go to a chat's template. Of rows of
    more than `max_length` tokens, a prompt loses its start first and then the completion its end, a text its end and a
    chat its start, so that every row keeps something to learn. Prompt and completion are tokenised apart, so that
    generation from the prompt sees the tokens of training. A dataset that has `input_ids` is returned as it is.

    Args:
        num_proc: processes that share the work.

    Raises:
        ValueError: text without a tokenizer, a tokenizer that cannot end a sequence, a chat without a template, or a
            row without its text.
    """
    if "input_ids" in dataset.column_names:
        return dataset
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(
            "the dataset holds text: pass a tokenizer with an `eos_token` as `processing_class`, or rows of "
            "`input_ids` and `labels`."
        )
    dataset = to_known_columns(dataset)
    if "messages" in dataset.column_names:
        if tokenizer.chat_template is None:
            raise ValueError("the dataset holds `messages`, but the tokenizer has no `chat_template`: set one.")
        encode = _encode_chat
    else:
        is_pair = {"prompt", "completion"} <= set(dataset.column_names)
        encode = _encode_pair if is_pair else _encode_text
    taken = [name for name in TAKEN_FOR_LABELS if name in dataset.column_names]
    options = {"tokenizer": tokenizer, "max_length": max_length}
    return dataset.map(
        encode, fn_kwargs=options, batched=True, num_proc=num_proc, remove_columns=taken, desc="Tokenising"
    )


Encoded = dict[str, list[list[int]]]


def _encode_pair(rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    prompts = without_end(tokenizer(rows["prompt"], truncation=False).input_ids, tokenizer)
    completions = tokenizer(rows["completion"], add_special_tokens=False).input_ids
    encoded: Encoded = {"input_ids": [], "labels": []}
    for prompt, completion in zip(prompts, completions, strict=True):
        completion = (completion + [tokenizer.eos_token_id])[: max_length - 1]
        prompt = prompt[max(0, len(prompt) + len(completion) - max_length) :]
        encoded["input_ids"].append(prompt + completion)
        encoded["labels"].append([IGNORED] * len(prompt) + completion)
    return encoded


def _encode_text(rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    texts = without_end(tokenizer(rows["text"]).input_ids, tokenizer)
    texts = [(tokens + [tokenizer.eos_token_id])[:max_length] for tokens in texts]
    return {"input_ids": texts, "labels": [list(text) for text in texts]}


def without_end(texts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Leave out the end, where the tokenizer adds one to every text."""
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    ends = whole[-1:] == [tokenizer.eos_token_id] and whole[len(whole) - len(plain) :] != plain
    return [tokens[:-1] for tokens in texts] if ends else texts


def _encode_chat(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    encoded: Encoded = {"input_ids": [], "labels": []}
    for row, messages in enumerate(rows["messages"]):
        options = {name: _given_to_template(name, rows[name][row]) for name in ("tools", _OPTIONS) if name in rows}
        learned_from = (rows[_PROMPT_TURNS][row] if _PROMPT_TURNS in rows else None) or 0  # None: another's form
        try:
            tokens, labels = _chat_tokens(messages, tokenizer, options, learned_from)
        except (KeyError, TypeError, TemplateError) as error:
            why = f"{type(error).__name__}: {error}"
            raise RowError(
                f"the tokenizer's chat template does not take a chat ({why}): give each turn `role` and `content`, in "
                f"the order that the model knows. The chat: {str(messages)[:200]}"
            ) from error
        end = 1 + max((place for place, label in enumerate(labels) if label != IGNORED), default=-1)
        if end == 0:
            roles = ", ".join(str(message["role"]) for message in messages) or "none"
            raise RowError(
                f'a chat has no turn of the role "assistant" to learn (its roles: {roles}): leave it out, or name '
                "roles as chat templates do."
            )
        kept = slice(max(0, end - max_length), end)
        encoded["input_ids"].append(tokens[kept])
        encoded["labels"].append(labels[kept])
    return encoded


def _given_to_template(name: str, value: Any) -> Any:
    """What a row has for a chat's template, as JSON too. A table has a place for every key of any row: those that are
    empty are left out."""

    def given(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: given(item) for key, item in value.items() if item is not None}
        return list(map(given, value)) if isinstance(value, list) else value

    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise RowError(f"`{name}` of a chat is no JSON ({error}): {str(value)[:200]}") from error
    return given(value) or None


def _chat_tokens(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], learned_from: int
) -> tuple[list[int], list[int]]:
    """A chat by the tokenizer's template; labels are on the assistant's turns, with what ends them.

    A turn is what the template adds to the chat before it with its prompt to answer (templates need not mark it).

    Args:
        options: `tools` and `chat_template_kwargs`, where there are any.
        learned_from: the first turn that may be learned.

    Raises:
        ValueError: a template that changes earlier turns.
    """

    more = options.get(_OPTIONS) or {}

    def template(count: int, prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            messages[:count], options.get("tools"), add_generation_prompt=prompt, return_dict=False, **more
        )

    tokens = template(len(messages), prompt=False)
    labels = [IGNORED] * len(tokens)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < learned_from:
            continue
        before = template(index, prompt=True) if index else []
        after = template(index + 1, prompt=False)
        if tokens[: len(before)] != before or tokens[: len(after)] != after:
            raise ValueError(
                "the tokenizer's chat template changes earlier turns of a chat (it may leave out their reasoning), so "
                "it is not known which tokens are the assistant's: pass chats of one answer, or another template."
            )
        labels[len(before) : len(after)] = tokens[len(before) : len(after)]
    return tokens, labels


def padded(length: int) -> int:
    """How long rows are that collators have padded."""
    return PAD_TO * -(-length // PAD_TO)


def map_datasets(datasets: Any, function: Callable[[Dataset], Any]) -> Any:
    """Apply `function` to a dataset, to each in a dict of datasets, or to nothing.

    Raises:
        ValueError: a streaming dataset.
    """
    if datasets is None:
        return None
    if isinstance(datasets, dict):
        return {name: map_datasets(dataset, function) for name, dataset in datasets.items()}
    if not hasattr(datasets, "__len__"):  # of `datasets` or of torch
        raise ValueError("a streaming dataset has no length and no rows to choose: pass a `datasets.Dataset`.")
    return function(datasets)


def first_rows(datasets: Any, count: int | None) -> Any:
    """Take the first `count` rows of a dataset or of each in a dict; all where it is None."""
    return map_datasets(datasets, lambda rows: rows if count is None else rows.select(range(min(count, len(rows)))))
