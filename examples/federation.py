"""A federation of four organisations on this machine: `make federation`.

    python examples/federation.py --rounds 4

Starts Flower's SuperLink and four nodes, each a process of its own with its own folder of data, a key and TLS; runs
the quickstart's stages over them; ends all that it has started. docs/federation.md does it on several machines.
"""

import argparse
import re
from pathlib import Path

import datasets

from hf_devft.cli.errors import one_line_errors
from hf_devft.embedded import task_dataset
from hf_devft.federation.partition import partition_dataset
from hf_devft.network.local import LocalFederation, local_federation
from hf_devft.network.server_app import TRAFFIC_NAME


RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ("north", "east", "south", "west")


def start_nodes(federation: LocalFederation) -> None:
    """Give each organisation its rows, of different kinds, and start its node."""
    rows = task_dataset(1600, seed=0)
    clients = partition_dataset(rows, "dirichlet", len(NAMES), column="family", alpha=0.5)
    for name, own in zip(NAMES, clients.rows.values(), strict=True):
        folder = federation.folder / name
        folder.mkdir()
        clients.dataset.select(own).select_columns(["prompt", "completion"]).to_json(folder / "rows.jsonl")
        federation.start_node(name, ["--train_file", f"{folder}/rows.jsonl", "--output_dir", str(folder)])
        print(f"{name}: {len(own)} rows in {folder}/rows.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/federation"), help="of all that is written")
    parser.add_argument("--rounds", type=int, default=4, help="of each stage")
    parser.add_argument("--flags", default="", help="further flags, as for recipes/devft.py")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with one_line_errors(), local_federation(options.folder) as federation:
        print(f"SuperLink at {federation.address}, with TLS; only nodes whose keys it knows can join")
        start_nodes(federation)
        print("They load PyTorch and join; the first round comes after half a minute", flush=True)
        flags = f'--output_dir "{federation.folder}/run" --stage_rounds {options.rounds} --eval_strategy epoch'
        run = federation.run(
            RECIPES / "federation",
            {
                "config": f"{RECIPES}/configs/quickstart.yaml",
                "overrides": f"{flags} {options.flags}".strip(),
                "clients": " ".join(NAMES),
                "min-clients": len(NAMES),
                "keys": str(federation.authority.parent),
            },
        )
        for line in run.stdout:
            if (text := re.sub(r"\x1b\[\d+m", "", line).rstrip()) and not text.startswith("INFO :"):
                print(text)
        run.wait()  # Flower's command ends well, however its run ends
        if not (federation.folder / "run" / TRAFFIC_NAME).exists():
            raise SystemExit(f"the run failed; all that was said is in {federation.folder}/*.log")


if __name__ == "__main__":
    main()
