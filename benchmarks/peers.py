"""Rounds a minute, memory and bytes, against how other tools run the same rounds.

    pip install 'hf-devft[simulation]'
    python benchmarks/peers.py

The same base, 20 clients, 2 a round, 10 steps of 16 examples, and LoRA adapter for all. Every peer runs in a process
of its own, in turns with the others, `--repeats` times; writes `results/peers.md`. The peers are written from what
is publicly known of how these tools work:

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

import numpy as np
import psutil
import torch
from bases import BASES, lora, make_base, rows, size_of, tokenizer
from datasets import Dataset
from machine import mean_and_spread, parser, publish
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from hf_devft import DevFTConfig, DevFTTrainer


CLIENTS, SAMPLED, STEPS, BATCH, RATE = 20, 2, 10, 16, 2e-3
State = dict[str, torch.Tensor]


def client_rows() -> list[Dataset]:
    dataset = rows(100 * CLIENTS)
    return [dataset.shard(CLIENTS, client) for client in range(CLIENTS)]


def sampled(round_index: int) -> list[int]:
    return np.random.default_rng([0, round_index]).choice(CLIENTS, SAMPLED, replace=False).tolist()


def train_with_a_trainer(model: PeftModel, data: Dataset, start: State, folder: str) -> State:
    """A client's local training by a `Trainer` of its own."""
    set_peft_model_state_dict(model, start)
    args = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, report_to="none",
        lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, args, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer())).train()
    return {key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(model).items()}


def mean(states: list[State]) -> State:
    return {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}


def loaded(base: str) -> PeftModel:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora())


def rounds_of(base: str, rounds: int, model_of: Callable[[], PeftModel]) -> dict:
    """Rounds, one client after another, each on `model_of()`."""
    data, seconds = client_rows(), []
    state = get_peft_model_state_dict(loaded(base))
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds):
            started = time.perf_counter()
            state = mean([train_with_a_trainer(model_of(), data[c], state, folder) for c in sampled(index)])
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "bytes": 2 * rounds * SAMPLED * bytes_of(state)}


def bytes_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def new_trainer(base: str, rounds: int) -> dict:
    model = loaded(base)
    return rounds_of(base, rounds, lambda: model)


def new_model(base: str, rounds: int) -> dict:
    return rounds_of(base, rounds, lambda: loaded(base))


def flower(base: str, rounds: int) -> dict:
    """The time of a round is that from one aggregation to the next."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, times = ClientApp(), ServerApp(), []
    start = get_peft_model_state_dict(loaded(base))

    @client.train()
    def train(message, context):
        data = client_rows()[context.node_config["partition-id"]]
        with tempfile.TemporaryDirectory() as folder:
            state = train_with_a_trainer(loaded(base), data, message.content["arrays"].to_torch_state_dict(), folder)
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
        strategy.start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=rounds)

    # Flower's way to hold clients one after another is to give each all cores.
    resources = {"client_resources": {"num_cpus": psutil.cpu_count(), "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config=resources)
    return {"seconds": np.diff(times).tolist(), "bytes": 2 * rounds * SAMPLED * bytes_of(start)}


def ours(base: str, rounds: int, stages: list[int]) -> dict:
    """A stage's first round also counts what it took to set the stage up."""
    with tempfile.TemporaryDirectory() as folder:
        args = DevFTConfig(
            output_dir=folder, stage_layers=stages, stage_rounds=[rounds // len(stages)], num_clients=CLIENTS,
            clients_per_round=SAMPLED, local_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        trainer = DevFTTrainer(
            model, args, peft_config=lora(), train_dataset=rows(100 * CLIENTS), processing_class=tokenizer()
        )
        trainer.train()
    seconds = [record.seconds for record in trainer.ledger.rounds]
    for stage in trainer.stages:
        first = next(index for index, record in enumerate(trainer.ledger.rounds) if record.stage == stage.stage)
        seconds[first] += stage.totals["setup_seconds"]
    return {"seconds": seconds, "bytes": trainer.ledger.bytes}


def peers(stages: list[int]) -> dict[str, Callable[[str, int], dict]]:
    return {
        "new Trainer per client (OpenFedLLM)": new_trainer,
        "new model per client (FlowerTune)": new_model,
        "Flower's simulation of that": flower,
        "hf-devft, all layers": lambda base, rounds: ours(base, rounds, stages[-1:]),
        f"hf-devft, stages {', '.join(map(str, stages))}": lambda base, rounds: ours(base, rounds, stages),
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
                time.sleep(0.3)
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


def compare(name: str, options: argparse.Namespace) -> list[str]:
    """A table's rows for one base."""
    base, stages = make_base(name), BASES[name][1]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        for repeat in range(options.repeats):
            for index, (peer, run) in enumerate(peers(stages).items()):
                if run is flower and find_spec("flwr") is None:
                    print("Flower is left out: pip install 'hf-devft[simulation]'")
                    continue
                command = ["--peer", str(index), "--base", name, "--path", folder, "--rounds", str(options.rounds)]
                found.setdefault(peer, []).append(run_peer(command))
                print(f"{name}, repeat {repeat + 1}, {peer}: {sum(found[peer][-1][0]['seconds']):.1f} s", flush=True)
    lines = []
    for peer, runs in found.items():
        speeds = [60 * len(run["seconds"]) / sum(run["seconds"]) for run, _ in runs]
        speed = mean_and_spread(speeds, "{:.1f}")
        memory = statistics.median(peak for _, peak in runs)
        sent = runs[0][0]["bytes"] / options.rounds
        lines.append(f"| {name}, {size_of(base)} | {peer} | {speed} | {memory / 1e9:.2f} | {sent / 1e6:.2f} |")
    return lines


def main() -> None:
    command_line = parser("peers", __doc__)
    command_line.add_argument("--rounds", type=int, default=6, help="of each run, a multiple of the stages")
    command_line.add_argument("--repeats", type=int, default=3)
    command_line.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    for internal in ("--peer", "--base", "--path", "--out"):
        command_line.add_argument(internal, help=argparse.SUPPRESS)
    options = command_line.parse_args()
    set_seed(0)
    if options.peer is not None:
        run = list(peers(BASES[options.base][1]).values())[int(options.peer)]
        Path(options.out).write_text(json.dumps(run(options.path, options.rounds)))
        return
    lines = [
        "| base | | rounds a minute | peak memory, GB | MB sent a round |",
        "|---|---|---:|---:|---:|",
        *(line for name in options.bases for line in compare(name, options)),
    ]
    command = f"--rounds {options.rounds} --repeats {options.repeats} --bases {' '.join(options.bases)}"
    publish(options.results, lines, f"peers.py {command}", "mean ± s.d. of the repeats")


if __name__ == "__main__":
    main()
