"""DevFT against FedIT at the same number of rounds, on the quickstart task.

    python benchmarks/quickstart.py --seeds 0 1 2

Runs every variant with every seed through the recipe, one after another, and writes `results/quickstart.json` and
`results/quickstart.md` beside this file. A run that is already in the JSON is not repeated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path


HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
RESULTS = HERE / "results"
PAPER = ["--grouping", "deconfliction", "--fusion", "differential", "--transfer", "broadcast"]
ANCHORS = ["--grouping", "deconfliction", "--fusion", "anchor", "--transfer", "broadcast"]
CALIBRATED = ["--grouping", "calibrated", "--fusion", "anchor", "--transfer", "anchor"]
# Name -> (config, overrides). A round is 2 clients of 10 local steps of 16 examples.
VARIANTS = {
    "FedIT, 30 rounds (`fedit.yaml`)": ("fedit.yaml", []),
    "FedIT, 18 rounds: about DevFT's bytes": ("fedit.yaml", ["--stage_rounds", "18"]),
    "DevFT, 30 rounds, the paper's rules": ("quickstart.yaml", PAPER),
    "DevFT, 30 rounds, the paper's groups, anchor fusion": ("quickstart.yaml", ANCHORS),
    "DevFT, 30 rounds, calibrated groups, anchors only": ("quickstart.yaml", CALIBRATED),
}
# Column -> (value of a run, format).
COLUMNS = {
    "exact match": (lambda run: run["metrics"]["eval_full_exact_match"], "{:.1%}"),
    "eval loss": (lambda run: run["metrics"]["eval_full_loss"], "{:.3f}"),
    "MB sent": (lambda run: run["totals"]["bytes"] / 1e6, "{:.1f}"),
    "TFLOPs": (lambda run: run["totals"]["flops"] / 1e12, "{:.1f}"),
    "seconds in rounds": (lambda run: run["totals"]["seconds"], "{:.0f}"),
    "seconds in all": (lambda run: run["wall_seconds"], "{:.0f}"),
}


def run(config: str, overrides: list[str], seed: int) -> dict:
    """One run of the recipe: the full-depth metrics of its last stage, the ledger's totals over all stages, and the
    process's wall time, with start-up, grouping, calibration and all evaluations."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPES / "devft.py"), "--config", str(RECIPES / "configs" / config)]
        subprocess.run(
            [*command, *overrides, "--seed", str(seed), "--output_dir", folder, "--disable_tqdm", "true"], check=True
        )
        stages = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("stage-*/stage_config.json"))]
    names = ("bytes", "flops", "seconds")
    totals = {name: sum(stage["totals"][name] for stage in stages) for name in names}
    by_stage = [{"layers": s["num_layers"], "metrics": s["metrics"], "totals": s["totals"]} for s in stages]
    wall = time.perf_counter() - started
    return {"metrics": stages[-1]["metrics"], "totals": totals, "wall_seconds": wall, "stages": by_stage}


def table(results: dict[str, dict[str, dict]]) -> str:
    """Mean ± standard deviation over the seeds, a row per variant."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for name, runs in results.items():
        cells = []
        for value, style in COLUMNS.values():
            values = [value(run) for run in runs.values()]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{style.format(statistics.mean(values))} ± {style.format(spread)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS / "quickstart.json")
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"runs": {}}
    for seed in arguments.seeds:  # seeds outside: a stopped benchmark has compared what it has run
        for name, (config, overrides) in VARIANTS.items():
            runs = content["runs"].setdefault(name, {})
            if str(seed) in runs:
                continue
            runs[str(seed)] = run(config, overrides, seed)
            revision = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
            )
            runs[str(seed)]["revision"] = revision.stdout.strip()
            content |= {"date": str(date.today()), "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
            arguments.results.write_text(json.dumps(content, indent=1) + "\n")
            print(f"seed {seed}, {name}: {runs[str(seed)]['metrics']}")
    text = table(content["runs"])
    seeds = min(map(len, content["runs"].values()))
    note = (
        f"`python benchmarks/quickstart.py`, {content['date']}, {content['machine']}; mean ± s.d. of {seeds} seeds.\n"
    )
    arguments.results.with_suffix(".md").write_text(f"{text}\n{note}")
    print(text)


if __name__ == "__main__":
    main()
