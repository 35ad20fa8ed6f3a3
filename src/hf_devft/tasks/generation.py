"""Greedy generation: what a model answers to the rows' prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_devft.tasks.data import IGNORED


def prompt_and_answer(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens of a row, without padding: the answer is what is labelled at the end (of a chat, the last turn), the
    prompt what stands before; there is none where the whole text is labelled."""
    real = row.get("attention_mask", [1] * len(row["input_ids"]))
    tokens, labels = ([value for value, is_real in zip(row[column], real, strict=True) if is_real]
                      for column in ("input_ids", "labels"))  # fmt: skip
    end = len(labels) - labels[::-1].index(IGNORED) if IGNORED in labels else 0
    return tokens[:end], tokens[end:]


def check_prompts(rows: Dataset) -> None:
    """Refuse rows that nothing can be generated for, before a run that evaluates so.

    Raises:
        ValueError: says what to set.
    """
    if any(IGNORED not in labels for labels in rows.with_format(None)["labels"]):
        raise ValueError(
            "predict_with_generate answers prompts, but some evaluation rows have none (a whole `text`, say): set it "
            "to false."
        )


@torch.no_grad()
def continuations(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
) -> dict[int, list[int]]:
    """Generate greedily: {a prompt's number: the tokens that follow it, up to the end of the sequence}.

    Args:
        process: this process's index and how many there are; they share the prompts, and each returns its own.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    found: dict[int, list[int]] = {}
    model.eval()
    for start in range(process[0] * batch_size, len(order), process[1] * batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        ends = _ends(model)
        found |= {index: _until(row, ends) for index, row in zip(chosen, new, strict=True)}
    return found


def _ends(model: PreTrainedModel | PeftModel) -> set[int]:
    """The tokens that end a sequence."""
    end = model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    length = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    process: tuple[int, int] = (0, 1),
) -> tuple[list[str], list[str]]:
    """Answer the rows' prompts greedily; returns the answers and the references, both as text, in the rows' order.

    Args:
        dataset: columns `input_ids` and `labels`; the answer is what is labelled at the end (of a chat, the last
            turn), the prompt what stands before.
        process: this process's index and how many there are; they share the rows, and each gets all answers.

    Raises:
        ValueError: a row has no prompt.
    """
    pairs = list(map(prompt_and_answer, dataset.with_format(None)))
    prompts = [prompt for prompt, _ in pairs]
    if not all(prompts):
        raise ValueError("some rows have no prompt that could be answered: all of their text is labelled.")
    tokens = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, process)
    answers = {index: tokenizer.decode(answer, skip_special_tokens=True) for index, answer in tokens.items()}
    parts = gather_object([answers]) if process[1] > 1 else [answers]
    texts = [text for _, text in sorted(item for part in parts for item in part.items())]
    return texts, [tokenizer.decode(reference, skip_special_tokens=True) for _, reference in pairs]


def exact_match(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
) -> float:
    """Measure the share of the rows whose prompt is answered as the reference is; see `generate_answers`."""
    from hf_devft.tasks.metrics import ExactMatch  # here, as `evaluate` takes long to import

    answers, references = generate_answers(model, tokenizer, dataset, max_new_tokens, batch_size, process)
    return ExactMatch().compute(predictions=answers, references=references)["exact_match"]
