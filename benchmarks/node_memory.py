"""What a node holds in memory in each stage, over a network, and what `devft plan` says that it would.

    pip install 'hf-devft[flower]'
    python benchmarks/node_memory.py --base build/gemma-gsm8k --data build/gsm8k --layers 2 4 9 18

One round of one client in each stage, rows of `train.jsonl` in the folder of data (see `real_base.py`). The base is
read from its files as far as a stage needs it. A plan counts what comes on top of Python and PyTorch, for rows as
long as the longest that the client has. Writes `results/node_memory.md`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from machine import RESULTS, machine

from hf_devft.network.local import local_federation


RECIPES = Path(__file__).parents[1] / "recipes"


CONFIG = f"{RECIPES}/configs/gemma3-270m.yaml"


def run_flags(base: str, layers: list[int], steps: int) -> list[str]:
    stages = f"--stage_layers {' '.join(map(str, layers))} --stage_rounds 1 --local_steps {steps}"
    return (
        f"--model_name_or_path {Path(base).absolute()} --num_clients 1 --clients_per_round 1 {stages} "
        "--eval_strategy no --save_strategy no --use_cpu true"
    ).split()


def planned(base: str, data: Path, layers: list[int], steps: int) -> dict[int, float]:
    """What a plan says of each stage, GB, by the stage's layers."""
    files = ["--train_file", str(data / "train.jsonl")]
    command = [sys.executable, str(RECIPES / "devft.py"), "--config", CONFIG, *files, "--plan_json"]
    said = subprocess.run(
        [*command, *run_flags(base, layers, steps)], capture_output=True, text=True, check=True
    ).stdout
    return {stage["num_layers"]: stage["client_memory"] / 1e9 for stage in json.loads(said)["stages"]}


def measure(base: str, data: Path, layers: list[int], steps: int) -> dict[int, float]:
    """The largest memory of the node's process in each stage, GB, by the stage's layers; under 0, before the first."""
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder, local_federation(Path(folder, "federation")) as federation:
        rows = ["--train_file", str(data.absolute() / "train.jsonl"), "--output_dir", f"{federation.folder}/node"]
        federation.start_node("node", [*rows, "--model_name_or_path", str(Path(base).absolute()), "--use_cpu", "true"])
        flags = " ".join(["--output_dir", f"{federation.folder}/run", *run_flags(base, layers, steps)])
        options = yaml.safe_load(Path(CONFIG).read_text())
        own = {key: value for key, value in options.items() if not key.startswith("dataset_")}  # rows are the node's
        config = federation.folder / "config.yaml"
        config.write_text(yaml.safe_dump(own))
        run = federation.run(RECIPES / "federation", {"config": str(config), "overrides": flags})
        node = psutil.Process(federation.processes["node"].pid)
        while run.poll() is None:
            said = re.findall(r"trains (\d+) layers", federation.log("node"))
            now, stage = node.memory_info().rss / 1e9, int(said[-1]) if said else 0
            found[stage] = max(found.get(stage, 0.0), now)
            time.sleep(0.2)
        if not set(layers) <= found.keys():  # Flower's command ends well, however its run ends
            raise RuntimeError(run.stdout.read())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a folder or Hub name")
    parser.add_argument("--data", type=Path, required=True, help="folder of train.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 9, 18], help="of the stages")
    parser.add_argument("--steps", type=int, default=2, help="of the client's turn")
    options = parser.parse_args()
    size = (options.base, options.data, options.layers, options.steps)
    plan, found = planned(*size), measure(*size)
    lines = ["| layers | the node's process, GB at most | planned, on top of Python and PyTorch |", "|---:|---:|---:|"]
    lines += [f"| {layers} | {found[layers]:.2f} | {plan[layers]:.2f} |" for layers in options.layers]
    lines += [
        "",
        f"Before its first turn the process has {found[0]:.2f} GB.",
        "",
        f"`python benchmarks/node_memory.py {' '.join(sys.argv[1:])}`, {machine()}.",
        "",
    ]
    (RESULTS / "node_memory.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
