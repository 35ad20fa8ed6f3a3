"""Rounds a minute, memory and bytes, against how other tools run the same rounds.

    pip install 'hf-devft[simulation]'
    python benchmarks/peers.py
    python benchmarks/peers.py --bases --real_base build/gemma --data build/gsm8k/train.jsonl --steps 2 --batch 4 \\
        --rounds 3 --results benchmarks/results/peers_real.md      # how that base is made: client_step.py

The same base, 20 clients, 2 a round, 10 steps of 16 examples, and LoRA adapter for all. Every peer runs in a process
of its own, in turns with the others, `--repeats` times; writes `results/peers.md`, and each run to `peers.jsonl`, from
which a stopped benchmark goes on. The peers are written from what is publicly known of how these tools work:

- new Trainer: a new `Trainer` for every client in every round, on one model (OpenFedLLM);
- new model: the base is loaded anew for every client as well (FlowerTune's app);
- Flower: such an app under Flower's own simulation engine;
- hf-devft, with all layers in every round, and with stages.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from bases import BASES, lora, make_base, rows, rows_of_file, size_of, tokenizer
from datasets import Dataset
from machine import machine, mean_and_spread, parser, publish
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)  # fmt: skip

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.federation.sampling import sample_clients
from hf_devft.files.checksums import sha256


CLIENTS, SAMPLED, RATE, SEED = 20, 2, 2e-3, 42
ROWS = 100 * CLIENTS
State = dict[str, torch.Tensor]


class Work(NamedTuple):
    """What a peer is given: the folder of a base and its tokenizer, that of all rows, and how much to train."""

    base: str
    data: str
    rounds: int
    steps: int
    batch: int

    def rows(self) -> Dataset:
        return Dataset.load_from_disk(self.data)

    def client_rows(self) -> list[Dataset]:
        return [self.rows().shard(CLIENTS, client) for client in range(CLIENTS)]

    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def with_adapter(self) -> PeftModel:
        return get_peft_model(self.model(), lora())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.base)

    def collator(self) -> DataCollatorForSeq2Seq:
        return DataCollatorForSeq2Seq(self.tokenizer())


def sampled(round_index: int) -> list[int]:
    """The clients that ours has in the round."""
    return sample_clients(range(CLIENTS), SAMPLED, SEED, round_index)


def train_with_a_trainer(
    work: Work, model: PeftModel, collator: DataCollatorForSeq2Seq, data: Dataset, start: State, folder: str
) -> State:
    """A client's local training by a `Trainer` of its own."""
    set_peft_model_state_dict(model, start)
    args = TrainingArguments(
        output_dir=folder, max_steps=work.steps, per_device_train_batch_size=work.batch, learning_rate=RATE,
        report_to="none", lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, args, train_dataset=data, data_collator=collator).train()
    return {key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(model).items()}


def mean(states: list[State]) -> State:
    return {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}


def rounds_of(work: Work, setup: Callable[[], tuple[PeftModel, DataCollatorForSeq2Seq]]) -> dict:
    """Rounds, one client after another, each with what `setup()` gives it."""
    data, seconds = work.client_rows(), []
    state = get_peft_model_state_dict(work.with_adapter())
    with tempfile.TemporaryDirectory() as folder:
        for index in range(work.rounds):
            started = time.perf_counter()
            state = mean([train_with_a_trainer(work, *setup(), data[c], state, folder) for c in sampled(index)])
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "bytes": bytes_sent(work, state)}


def bytes_sent(work: Work, state: State) -> int:
    return 2 * work.rounds * SAMPLED * sum(tensor.nbytes for tensor in state.values())


def new_trainer(work: Work) -> dict:
    once = work.with_adapter(), work.collator()
    return rounds_of(work, lambda: once)


def new_model(work: Work) -> dict:
    return rounds_of(work, lambda: (work.with_adapter(), work.collator()))


def flower(work: Work) -> dict:
    """The time of a round is that from one aggregation to the next."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, times = ClientApp(), ServerApp(), []
    start = get_peft_model_state_dict(work.with_adapter())

    @client.train()
    def train(message, context):
        data = work.client_rows()[context.node_config["partition-id"]]
        state = message.content["arrays"].to_torch_state_dict()
        with tempfile.TemporaryDirectory() as folder:
            state = train_with_a_trainer(work, work.with_adapter(), work.collator(), data, state, folder)
        metrics = MetricRecord({"num-examples": len(data)})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    class Timed(FedAvg):
        def aggregate_train(self, *args):
            aggregated = super().aggregate_train(*args)
            times.append(time.perf_counter())
            return aggregated

    @server.main()
    def main(grid, context):
        share = SAMPLED / CLIENTS
        strategy = Timed(
            fraction_train=share, fraction_evaluate=0, min_train_nodes=SAMPLED, min_available_nodes=CLIENTS
        )
        times.append(time.perf_counter())
        strategy.start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=work.rounds)

    # Flower's way to hold clients one after another is to give each all cores.
    resources = {"client_resources": {"num_cpus": psutil.cpu_count(), "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config=resources)
    return {"seconds": np.diff(times).tolist(), "bytes": bytes_sent(work, start)}


def ours(work: Work, stages: list[int]) -> dict:
    """A stage's first round also counts what it took to set the stage up."""
    with tempfile.TemporaryDirectory() as folder:
        args = DevFTConfig(
            output_dir=folder, stage_layers=stages, stage_rounds=[work.rounds // len(stages)], seed=SEED,
            clients_per_round=SAMPLED, local_steps=work.steps, per_device_train_batch_size=work.batch,
            learning_rate=RATE, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = DevFTTrainer(
            work.model(),
            args,
            peft_config=lora(),
            train_dataset={f"client-{index}": rows for index, rows in enumerate(work.client_rows())},
            processing_class=work.tokenizer(),
        )
        trainer.train()
    seconds = [record.seconds for record in trainer.ledger.rounds]
    for stage in trainer.stages:
        first = next(index for index, record in enumerate(trainer.ledger.rounds) if record.stage == stage.stage)
        seconds[first] += stage.totals["setup_seconds"]
    return {"seconds": seconds, "bytes": trainer.ledger.bytes}


def peers(stages: list[int]) -> dict[str, Callable[[Work], dict]]:
    return {
        "new Trainer per client (OpenFedLLM)": new_trainer,
        "new model per client (FlowerTune)": new_model,
        "Flower's simulation of that": flower,
        "hf-devft, all layers": lambda work: ours(work, stages[-1:]),
        f"hf-devft, stages {', '.join(map(str, stages))}": lambda work: ours(work, stages),
    }


def run_peer(command: list[str], script: str = __file__) -> tuple[dict, int]:
    """What a peer's process wrote, and the most memory that it and its children shared out, in bytes."""
    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        with open(Path(folder) / "log", "w+") as log:
            process = psutil.Popen([sys.executable, script, *command, "--out", str(out)], stdout=log, stderr=log)
            while process.poll() is None:
                peak = max(peak, proportional_memory(process))
                time.sleep(1)  # a look takes a while, of a process of gigabytes
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)}:\n{log.read()[-4000:]}")
        return json.loads(out.read_text()), peak


def proportional_memory(process: psutil.Process) -> int:
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it has ended meanwhile
    return total


def compare(about: str, stages: list[int], base: str, data: str, options: argparse.Namespace) -> list[str]:
    """A table's rows for the base and the rows of two folders."""
    size = {flag: getattr(options, flag) for flag in ("rounds", "steps", "batch")}
    measured_by = size | {"script": sha256(Path(__file__))[:8]}  # a run of another script is measured anew
    given = ["--base", base, "--rows", data, "--stages", *map(str, stages)]
    given += [f"--{flag}={value}" for flag, value in size.items()]
    file: Path = options.results.with_suffix(".jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for repeat in range(options.repeats):
        for index, (peer, run) in enumerate(peers(stages).items()):
            key = {"base": about, "peer": peer, "repeat": repeat} | measured_by
            if any(key.items() <= each.items() for each in known):
                continue
            if run is flower and find_spec("ray") is None:  # which its simulation needs
                print("Flower is left out: pip install 'hf-devft[simulation]'")
                continue
            result, peak = run_peer(["--peer", str(index), *given])
            known.append(key | result | {"peak": peak, "machine": machine()})
            with file.open("a") as lines:
                lines.write(json.dumps(known[-1]) + "\n")
            print(f"{about}, repeat {repeat + 1}, {peer}: {sum(result['seconds']):.1f} s", flush=True)
    mine = {"base": about} | measured_by
    return table_rows([each for each in known if mine.items() <= each.items() and each["repeat"] < options.repeats])


def table_rows(runs: list[dict]) -> list[str]:
    """A row for each peer; its speed also against that of the first one in the same repeat."""
    speeds: dict[str, dict[int, float]] = {}
    for run in runs:
        speeds.setdefault(run["peer"], {})[run["repeat"]] = 60 * len(run["seconds"]) / sum(run["seconds"])
    first, lines = next(iter(speeds.values())), []
    for peer, own in speeds.items():
        times = mean_and_spread([speed / first[repeat] for repeat, speed in own.items() if repeat in first], "{:.2f}")
        speed = mean_and_spread(list(own.values()), "{:.2f}" if max(own.values()) < 10 else "{:.1f}")
        mine = [run for run in runs if run["peer"] == peer]
        memory = statistics.median(run["peak"] for run in mine)
        sent = mine[0]["bytes"] / mine[0]["rounds"]
        lines.append(f"| {mine[0]['base']} | {peer} | {speed} | {times} | {memory / 1e9:.2f} | {sent / 1e6:.2f} |")
    return lines


def compare_made(name: str, options: argparse.Namespace) -> list[str]:
    """A base that is made here, on the embedded tasks."""
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as data:
        model = make_base(name)
        model.save_pretrained(base)
        tokenizer().save_pretrained(base)
        rows(ROWS).save_to_disk(data)
        return compare(f"{name}, {size_of(model)}", BASES[name][1], base, data, options)


def compare_real(base: str, options: argparse.Namespace) -> list[str]:
    """A base of a folder, on the prompts and answers of a file."""
    with tempfile.TemporaryDirectory() as data:
        rows_of_file(base, options.data, ROWS).save_to_disk(data)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        depth = model.config.num_hidden_layers
        about = f"{Path(base).name}, {size_of(model)}"
        return compare(about, [depth // 4, depth // 2, depth], base, data, options)


def main() -> None:
    command_line = parser("peers", __doc__)
    command_line.add_argument("--rounds", type=int, default=6, help="of each run, a multiple of the stages")
    command_line.add_argument("--steps", type=int, default=10, help="of a client in a round")
    command_line.add_argument("--batch", type=int, default=16, help="rows of a step")
    command_line.add_argument("--repeats", type=int, default=3)
    command_line.add_argument("--bases", nargs="*", choices=BASES, default=list(BASES))
    command_line.add_argument("--real_base", help="a folder")
    command_line.add_argument("--data", help="a file of prompts and answers, for the real base")
    command_line.add_argument("--stages", type=int, nargs="+", help=argparse.SUPPRESS)
    for internal in ("--peer", "--base", "--rows", "--out"):
        command_line.add_argument(internal, help=argparse.SUPPRESS)
    options = command_line.parse_args()
    set_seed(0)
    if options.peer is not None:
        run = list(peers(options.stages).values())[int(options.peer)]
        work = Work(options.base, options.rows, options.rounds, options.steps, options.batch)
        Path(options.out).write_text(json.dumps(run(work)))
        return
    titles = "| base | | rounds a minute | times as fast | peak memory, GB | MB sent a round |"
    lines = [titles, "|---|---|---:|---:|---:|---:|"]
    for name in options.bases:
        lines += compare_made(name, options)
    if options.real_base:
        lines += compare_real(options.real_base, options)
    publish(options.results, lines, " ".join(["peers.py", *sys.argv[1:]]), "mean ± s.d. of the repeats")


if __name__ == "__main__":
    main()
