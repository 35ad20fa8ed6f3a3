"""What a node holds in memory in each stage, over a network.

    pip install 'hf-devft[flower]'
    python benchmarks/node_memory.py --base build/gemma-gsm8k --data build/gsm8k --layers 5 9 18

One round of one client in each stage, rows of `train.jsonl` in the folder of data (see `real_base.py`). The base is
read from its files as far as a stage needs it. Writes `results/node_memory.md`.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

import psutil
from machine import RESULTS, machine

from hf_devft.network.local import local_federation


RECIPES = Path(__file__).parents[1] / "recipes"


def measure(base: str, data: Path, layers: list[int], steps: int) -> dict[int, float]:
    """The largest memory of the node's process in each stage, GB, by the stage's layers."""
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder, local_federation(Path(folder, "federation")) as federation:
        rows = ["--train_file", str(data.absolute() / "train.jsonl"), "--output_dir", f"{federation.folder}/node"]
        federation.start_node("node", [*rows, "--model_name_or_path", str(Path(base).absolute()), "--use_cpu", "true"])
        flags = (
            f"--model_name_or_path {Path(base).absolute()} --output_dir {federation.folder}/run --num_clients 1 "
            f"--clients_per_round 1 --stage_layers {' '.join(map(str, layers))} --stage_rounds 1 "
            f"--local_steps {steps} --eval_strategy no --save_strategy no --use_cpu true"
        )
        run = federation.run(
            RECIPES / "federation", {"config": f"{RECIPES}/configs/gemma3-270m.yaml", "overrides": flags}
        )
        node = psutil.Process(federation.processes["node"].pid)
        while run.poll() is None:
            said = re.findall(r"trains (\d+) layers", federation.log("node"))
            if said:
                now = node.memory_info().rss / 1e9
                found[int(said[-1])] = max(found.get(int(said[-1]), 0.0), now)
            time.sleep(0.2)
        if run.returncode:
            raise RuntimeError(run.stdout.read())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a folder or Hub name")
    parser.add_argument("--data", type=Path, required=True, help="folder of train.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 9, 18], help="of the stages")
    parser.add_argument("--steps", type=int, default=2, help="of the client's turn")
    options = parser.parse_args()
    found = measure(options.base, options.data, options.layers, options.steps)
    lines = ["| layers | the node's process, GB at most |", "|---:|---:|"]
    lines += [f"| {layers} | {peak:.1f} |" for layers, peak in found.items()]
    lines += [
        "",
        f"`python benchmarks/node_memory.py --layers {' '.join(map(str, options.layers))}`, {machine()}.",
        "",
    ]
    (RESULTS / "node_memory.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
