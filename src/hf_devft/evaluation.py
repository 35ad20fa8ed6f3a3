"""Answers by greedy generation, from tokenised rows."""

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_devft.metrics import IGNORED


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    process: tuple[int, int] = (0, 1),
) -> tuple[list[str], list[str]]:
    """Greedy answers to the rows' prompts, and the reference answers, both as text, in the rows' order.

    Args:
        dataset: columns `input_ids` and `labels`; a prompt is what stands before the first label.
        process: this process's index and how many there are; they share the rows, and each gets all answers.
    """
    prompts, references = [], []
    for row in dataset:
        answer = [label for label in row["labels"] if label != IGNORED]
        start = next(index for index, label in enumerate(row["labels"]) if label != IGNORED)
        prompts.append(list(row["input_ids"][:start]))
        references.append(tokenizer.decode(answer, skip_special_tokens=True))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    answers: dict[int, str] = {}
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
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= zip(chosen, texts, strict=True)
    parts = gather_object([answers]) if process[1] > 1 else [answers]
    return [text for _, text in sorted(item for part in parts for item in part.items())], references
