"""Rows -> token ids with labels on the completion only."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase


def _from_instruction(row: dict, answer: str) -> dict[str, str]:
    context = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
    prompt = f"### Instruction:\n{row['instruction']}{context}\n\n### Response:\n"
    return {"prompt": prompt, "completion": row[answer]}


def _from_question(row: dict, answer: str) -> dict[str, str]:
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row[answer]}"}


# (columns that must be there) -> how to make a prompt and a completion of them; the last column is the answer.
_FORMATS = {
    ("prompt", "completion"): None,
    ("instruction", "output"): _from_instruction,
    ("instruction", "response"): _from_instruction,
    ("question", "answer"): _from_question,
}


def to_prompt_completion(dataset: Dataset) -> Dataset:
    """Rows with string columns `prompt` and `completion`, whatever of the known formats they came in.

    Known are prompt/completion, instruction/(input)/output, instruction/(input)/response and question/answer;
    other columns are kept.

    Raises:
        ValueError: none of these.
    """
    for columns, convert in _FORMATS.items():
        if set(columns) <= set(dataset.column_names):
            if convert is None:
                return dataset
            return dataset.map(convert, fn_kwargs={"answer": columns[-1]}, desc="Formatting")
    known = ", ".join("/".join(columns) for columns in _FORMATS)
    raise ValueError(f"the dataset has columns {dataset.column_names}, but needs one of: {known}.")


def load_files(files: Sequence[str]) -> Dataset:
    """Local JSON or JSONL files as one dataset of `prompt`, `completion`, `source` (the file's stem).

    Other columns are kept where every file has them.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: unknown columns, or text that is not JSON.
    """
    datasets = []
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} is not a file: give the paths of JSON or JSONL files.")
        try:
            dataset = load_dataset("json", data_files=str(file), split="train")
        except Exception as error:
            raise ValueError(f"{file} could not be read as JSON or JSONL: {error.__cause__ or error}") from error
        try:
            dataset = to_prompt_completion(dataset)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        datasets.append(dataset.add_column("source", [Path(file).stem] * len(dataset)))
    shared = [name for name in datasets[0].column_names if all(name in d.column_names for d in datasets)]
    return concatenate_datasets([dataset.select_columns(shared) for dataset in datasets])


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> Dataset:
    """Add `input_ids` (prompt, completion, end of sequence) and `labels` (-100 on the prompt).

    Rows of more than `max_length` tokens lose the start of the prompt first and then the end of the completion,
    so that every row keeps something to learn. Prompt and completion are tokenised apart, so that generation
    from the prompt sees the tokens of training. A dataset that has `input_ids` is returned as it is.

    Raises:
        ValueError: text without a tokenizer, or a tokenizer that cannot end a sequence.
    """
    if "input_ids" in dataset.column_names:
        return dataset
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(
            "the dataset holds text: pass a tokenizer with an `eos_token` as `processing_class`, or rows of "
            "`input_ids` and `labels`."
        )

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer(rows["prompt"], truncation=False).input_ids
        completions = tokenizer(rows["completion"], add_special_tokens=False).input_ids
        encoded = {"input_ids": [], "labels": []}
        for prompt, completion in zip(prompts, completions, strict=True):
            completion = (completion + [tokenizer.eos_token_id])[: max_length - 1]
            prompt = prompt[max(0, len(prompt) + len(completion) - max_length) :]
            encoded["input_ids"].append(prompt + completion)
            encoded["labels"].append([-100] * len(prompt) + completion)
        return encoded

    return to_prompt_completion(dataset).map(encode, batched=True, desc="Tokenising")


def each(datasets: Any, function: Callable[[Dataset], Any]) -> Any:
    """`function` of a dataset, of each in a dict of datasets, or of nothing."""
    if datasets is None:
        return None
    if isinstance(datasets, dict):
        return {name: function(dataset) for name, dataset in datasets.items()}
    return function(datasets)


def first_rows(datasets: Any, count: int | None) -> Any:
    """The first `count` rows of a dataset or of each in a dict; all where it is None."""
    return each(datasets, lambda rows: rows if count is None else rows.select(range(min(count, len(rows)))))
