"""What a round costs over a network, against the same local steps in one process.

    pip install 'hf-devft[flower]'
    python benchmarks/network.py

One client a round, one thread each, on loopback with TLS and authentication. "our node" keeps the base and the stage's
submodel in its memory; "Flower's SuperNode" starts a process for each message, which loads them, as FlowerTune's apps
do. Seconds are medians of a stage's rounds from the second on, in which a node may still have to build its submodel.
Flower's SuperNode, which takes half a minute a round, has five of them. Writes `results/network.jsonl` and `.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
from machine import RESULTS, machine

from hf_devft.embedded import task_dataset
from hf_devft.network.local import LocalFederation, local_federation, program


RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ("north", "south")
ROWS = 200  # of each client


def flags(output_dir: str, steps: int, rounds: int) -> list[str]:
    quiet = "--eval_strategy no --eval_on_start false --predict_with_generate false --save_strategy no".split()
    size = f"--local_steps {steps} --stage_rounds {rounds} --clients_per_round 1 --num_clients {len(NAMES)}".split()
    return ["--output_dir", output_dir, *quiet, *size, "--use_cpu", "true", "--disable_tqdm", "true"]


def in_process(steps: int, rounds: int) -> dict[int, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        own = ["--task_rows", str(ROWS * len(NAMES)), "--partition", "iid"]
        command = [sys.executable, str(RECIPES / "devft.py"), *flags(folder, steps, rounds), *own]
        environment = {**LocalFederation(Path(folder)).environment, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return seconds(Path(folder))


def over_network(steps: int, rounds: int, start_client) -> dict[int, list[float]]:
    with tempfile.TemporaryDirectory() as folder, local_federation(Path(folder, "federation")) as federation:
        rows = task_dataset(ROWS * len(NAMES), seed=0).select_columns(["prompt", "completion"])
        for number, name in enumerate(NAMES):
            (federation.folder / name).mkdir()
            file = federation.folder / name / "rows.jsonl"
            rows.select(range(ROWS * number, ROWS * (number + 1))).to_json(file)
            start_client(federation, name, file)
        overrides = " ".join(flags(f"{federation.folder}/run", steps, rounds))
        config = {"config": f"{RECIPES}/configs/quickstart.yaml", "overrides": overrides, "clients": " ".join(NAMES)}
        run = federation.run(RECIPES / "federation", config | {"min-clients": len(NAMES)})
        said = run.communicate()[0]
        if run.returncode:
            raise RuntimeError(said)
        return seconds(federation.folder / "run")


def our_node(federation: LocalFederation, name: str, file: Path) -> None:
    federation.start_node(name, ["--train_file", str(file), "--output_dir", str(file.parent), "--use_cpu", "true"])


def flowers_supernode(federation: LocalFederation, name: str, file: Path) -> None:
    key = federation.make_key(name)
    config = f'name="{name}" train-file="{file}" output-dir="{file.parent}" use-cpu=true'
    connection = ["--superlink", federation.address, "--root-certificates", str(federation.authority)]
    command = [program("flower-supernode"), *connection, "--auth-supernode-private-key", str(key)]
    port = str(9100 + NAMES.index(name))
    federation.start(name, [*command, "--node-config", config, "--port", port])


def seconds(folder: Path) -> dict[int, list[float]]:
    """Of each stage's rounds, from the second on, by its layers."""
    stages = [json.loads(path.read_text()) for path in sorted(folder.glob("stage-*/stage_config.json"))]
    rounds = json.loads((folder / f"stage-{len(stages)}" / "ledger.json").read_text())
    found = {}
    for stage in stages:
        mine = [each["seconds"] for each in rounds if each["stage"] == stage["stage"]]
        found[stage["num_layers"]] = mine[1:]
    return found


WAYS = {
    "in one process": in_process,
    "over the network, our node": lambda *size: over_network(*size, our_node),
    "over the network, Flower's SuperNode": lambda *size: over_network(*size, flowers_supernode),
}
MOST_ROUNDS = {"over the network, Flower's SuperNode": 5}


def table(runs: list[dict]) -> str:
    medians = {
        (run["way"], run["steps"]): {k: statistics.median(v) for k, v in run["seconds"].items()} for run in runs
    }
    layers = [str(key) for key in runs[0]["seconds"]]
    lines = [
        f"| | local steps | {' | '.join(f'{each} layers' for each in layers)} |",
        f"|---|---:|{'---:|' * len(layers)}",
    ]
    for (way, steps), found in medians.items():
        alone = medians["in one process", steps]
        cells = [f"{found[each]:.2f} s ({found[each] / alone[each]:.2f})" for each in layers]
        lines.append(f"| {way} | {steps} | {' | '.join(cells)} |")
    machines = "; ".join(dict.fromkeys(run["machine"] for run in runs))
    return "\n".join(lines) + f"\n\n`python benchmarks/network.py`, {machines}; medians.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=13, help="of each stage")
    parser.add_argument("--steps", type=int, nargs="+", default=[10], help="of a client's turn")
    parser.add_argument("--results", type=Path, default=RESULTS / "network.jsonl")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    runs = []
    for steps in options.steps:
        for way, measure in WAYS.items():
            rounds = min(options.rounds, MOST_ROUNDS.get(way, options.rounds))
            found = {str(key): [round(each, 3) for each in values] for key, values in measure(steps, rounds).items()}
            runs.append({"way": way, "steps": steps, "seconds": found, "machine": machine()})
            print(json.dumps(runs[-1]), flush=True)
    options.results.write_text("".join(json.dumps(run, separators=(",", ":")) + "\n" for run in runs))
    options.results.with_suffix(".md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
