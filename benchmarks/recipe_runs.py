"""What the benchmarks of whole runs have in common: the recipe run in a process of its own, and results that are
kept."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import yaml
from machine import RESULTS, machine, mean_and_spread
from matplotlib.figure import Figure

from hf_devft.run.comparison import Point, read_curve


HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
RECIPE = RECIPES / "devft.py"
UNFINISHED = HERE.parent / "build" / "runs"
QUIET = ["--disable_tqdm", "true"]

# Column -> (value of a run, format).
COLUMNS = {
    "exact match": (lambda run: run["metrics"]["eval_full_exact_match"], "{:.1%}"),
    "eval loss": (lambda run: run["metrics"]["eval_full_loss"], "{:.3f}"),
    "MB sent": (lambda run: run["totals"]["bytes"] / 1e6, "{:.1f}"),
    "TFLOPs": (lambda run: run["totals"]["flops"] / 1e12, "{:.1f}"),
}


Measure = Callable[[Path], dict[str, float]]


def run_recipe(
    script: list[str],
    config: str,
    overrides: list[str],
    environment: Mapping[str, str],
    curve: bool = False,
    measure: Measure | None = None,
) -> dict:
    """One run of the recipe: the full-depth metrics of its last stage, the ledger's totals over all stages, the
    process's wall time, with start-up, grouping, calibration and all evaluations (None where a run was stopped and
    went on), and the commit that it was begun at; with `curve`, what every evaluation at full depth found, and with
    `measure`, what that finds in the run's folder. The folder is of these arguments and gone when all is found: the
    same call goes on with a run that was stopped."""
    command = [*script, "--config", str(RECIPES / "configs" / config), *overrides]
    folder = UNFINISHED / digest_of(script, config, overrides)
    goes_on, begun = folder.exists(), folder.with_suffix(".commit")
    if not goes_on:
        UNFINISHED.mkdir(parents=True, exist_ok=True)
        begun.write_text(revision())
    started = time.perf_counter()
    if not _is_over(folder):
        done = subprocess.run(
            [sys.executable, *command, "--output_dir", str(folder), "--resume_from_checkpoint", "last", *QUIET],
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )
        if done.returncode:
            raise RuntimeError(f"{config} {' '.join(overrides)}:\n{done.stderr}")
    stages = [json.loads(path.read_text()) for path in sorted(folder.glob("stage-*/stage_config.json"))]
    more = {"curve": [_until(point) for point in read_curve(folder) if point.rounds]} if curve else {}
    wall = None if goes_on else time.perf_counter() - started
    more |= {"measured": measure(folder)} if measure else {}
    commit = begun.read_text()
    shutil.rmtree(folder)
    begun.unlink()
    names = ("bytes", "flops", "seconds")
    totals = {name: sum(stage["totals"][name] for stage in stages) for name in names}
    totals["client_flops"] = totals["flops"]
    totals["flops"] += sum(stage["totals"]["setup_flops"] for stage in stages)  # of the server
    by_stage = [
        {"layers": s["num_layers"], "metrics": s["metrics"], "peak_memory": s["totals"]["peak_memory"]} for s in stages
    ]
    found = {"metrics": stages[-1]["metrics"], "totals": totals, "wall_seconds": wall, "stages": by_stage}
    return found | {"revision": commit} | more


def digest_of(script: list[str], config: str, overrides: list[str]) -> str:
    """What is run, by which a row is known again: the config's options, flags and base."""
    options = yaml.safe_load((RECIPES / "configs" / config).read_text())
    named = json.dumps([os.path.relpath(script[0], HERE), *script[1:], options, *overrides])
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _is_over(folder: Path) -> bool:
    """Whether a run has finished its last stage."""
    newest = folder / "stage_config.json"
    if not newest.exists():
        return False
    record = json.loads(newest.read_text())
    return record["stage"] == record["num_stages"]


def _until(point: Point) -> dict:
    """What a run has taken until an evaluation at full depth."""
    until = {"client_flops": point.flops, "flops": point.flops + point.server_flops, "seconds": point.seconds}
    return {"rounds": point.rounds, "loss": point.loss, "bytes": point.bytes} | until


def revision() -> str:
    """The commit that is measured."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip()


def run_all(
    variants: Mapping[str, tuple[str, list[str]]],
    options: argparse.Namespace,
    curve: bool = False,
    script: Callable[[str], list[str]] = lambda name: [str(RECIPE)],
    measure: Measure | None = None,
) -> dict[str, dict[str, dict]]:
    """Every variant with every seed, {name: {seed: run}}; what is in the results already is not run again.

    Args:
        variants: name -> (config, overrides).
        options: see `arguments`; every run is a line of the results, added when it is over.
        curve, measure: see `run_recipe`.
        script: name -> what runs it, and its first arguments; default: the recipe.
    """
    path, workers = options.results, options.workers
    known = read_runs(path)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    base = ["--model_name_or_path", options.base] if options.base else []
    lock = Lock()

    def asked(task: tuple[int, str]) -> tuple[list[str], str, list[str]]:
        seed, name = task
        config, overrides = variants[name]
        return script(name), config, [*overrides, *base, "--seed", str(seed)]

    def is_known(task: tuple[int, str]) -> bool:
        seed, name = task
        row = known.get(name, {}).get(str(seed))
        if row is not None and row.get("digest", digest := digest_of(*asked(task))) != digest:  # older rows have none
            raise SystemExit(f"{path} has {name!r}, seed {seed}, of another base or config: give another --results.")
        return row is not None

    def run(task: tuple[int, str]) -> None:
        seed, name = task
        about = {"machine": machine(), "digest": digest_of(*asked(task))}
        result = run_recipe(*asked(task), threads, curve, measure) | about
        with lock, path.open("a") as file:
            known.setdefault(name, {})[str(seed)] = result
            row = to_row(name, seed, result)
            file.write(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n")
        print(f"seed {seed}, {name}: {result['metrics']}", flush=True)

    # Seeds outside: a stopped benchmark has compared what it has run.
    chosen = [
        name for name in variants if any(part == name if part in variants else part in name for part in options.only)
    ]
    tasks = [task for task in ((seed, name) for seed in options.seeds for name in chosen) if not is_known(task)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, tasks))
    return {name: known.get(name, {}) for name in variants}


# What is kept of a run: what tables and plots need, rounded to as many digits as no table shows.
_STAGE = ("eval_loss", "eval_full_loss", "eval_full_exact_match")
_CURVE = ("rounds", "loss", "bytes", "client_flops", "server_flops", "seconds")
_UNITS = {"server_flops": 1e9, "client_flops": 1e9}  # of numbers that would be long
_DIGITS = 6


def to_row(name: str, seed: int, run: dict) -> dict:
    """A run as a line of the results; stages and points of the curve are lists, by `_STAGE` and `_CURVE`."""
    row = {
        "run": name,
        "seed": seed,
        "revision": run["revision"],
        "machine": run["machine"],
        "digest": run["digest"],
        "totals": run["totals"] | {"seconds": round(run["totals"]["seconds"], 1)},
        "wall_seconds": run["wall_seconds"] and round(run["wall_seconds"], 1),
        "stages": [
            [stage["layers"], *(_round(stage["metrics"].get(key)) for key in _STAGE), stage["peak_memory"]]
            for stage in run["stages"]
        ],
    }
    if "curve" in run:
        points = [point | {"server_flops": point["flops"] - point["client_flops"]} for point in run["curve"]]
        row["curve"] = [[_in_units(key, point[key]) for key in _CURVE] for point in points]
    if "measured" in run:
        row["measured"] = {key: _round(value) for key, value in run["measured"].items()}
    return row


def _in_units(key: str, value: float) -> float:
    return _round(value / _UNITS[key]) if key in _UNITS else _round(value)


def _round(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def _from_row(row: dict) -> dict:
    """A run, from what `to_row` has made of it."""
    named = [dict(zip(_STAGE, values, strict=False)) for _, *values in row["stages"]]
    stages = [
        {
            "layers": stage[0],
            "metrics": {key: value for key, value in metrics.items() if value is not None},
            "peak_memory": stage[-1] if len(stage) > 1 + len(_STAGE) else None,  # rows of before lack it
        }
        for stage, metrics in zip(row["stages"], named, strict=True)
    ]
    curve = [
        {key: value * _UNITS.get(key, 1) for key, value in zip(_CURVE, point, strict=True)}
        for point in row.get("curve", [])
    ]
    curve = [point | {"flops": point["client_flops"] + point["server_flops"]} for point in curve]
    return row | {"stages": stages, "metrics": stages[-1]["metrics"], "curve": curve}


def read_runs(path: Path) -> dict[str, dict[str, dict]]:
    """{name: {seed: run}} of the results, in the order in which they were measured."""
    runs: dict[str, dict[str, dict]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        runs.setdefault(row["run"], {})[str(row["seed"])] = _from_row(row)
    return runs


def table(
    results: Mapping[str, dict[str, dict]],
    columns: Mapping[str, tuple[Callable[[dict], float], str]] = COLUMNS,
    title: str = "",
) -> str:
    """Mean ± standard deviation over the seeds, a row for each variant that has run.

    Args:
        columns: title -> (value of a run, format).
        title: of the variants' names.
    """
    first = f"| {title}".rstrip()
    lines = [f"{first} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, runs in results.items():
        if runs:
            lines.append(f"| {name} | {' | '.join(spread(runs, *column) for column in columns.values())} |")
    return "\n".join(lines) + "\n"


def note(options: argparse.Namespace, results: Mapping[str, dict[str, dict]]) -> str:
    """When and where the results were measured."""
    counts = [len(runs) for runs in results.values() if runs]
    days, machines = zip(
        *(run["machine"].split(", ", 1) for runs in results.values() for run in runs.values()), strict=True
    )
    days = f"{min(days)} to {max(days)}" if min(days) < max(days) else min(days)
    seeds = f"{min(counts)} to {max(counts)} seeds" if min(counts) < max(counts) else f"{max(counts)} seeds"
    measured = "one seed" if max(counts) == 1 else f"mean ± s.d. of {seeds}"
    flags = {"base": options.base, "data": getattr(options, "data", None)}
    named = "".join(f" --{name} {os.path.relpath(path, HERE.parent)}" for name, path in flags.items() if path)
    precision = " --float32" if options.float32 else ""
    where = "; ".join(dict.fromkeys(machines))
    return f"`python benchmarks/{options.name}.py{named}{precision}`, {days}, {where}; {measured}.\n"


def publish_runs(
    options: argparse.Namespace, results: Mapping[str, dict[str, dict]], text: str, figure: Figure | None = None
) -> None:
    """Write what runs came to, `text` and when it was measured, beside the results, and show it."""
    options.results.with_suffix(".md").write_text(f"{text}\n{note(options, results)}")
    if figure is not None:
        figure.savefig(options.image, dpi=110)
    print(text)


def arguments(
    name: str, doc: str, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """The command line of a benchmark of whole runs; `add` adds flags of its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path, help="default: a file of the benchmark's name")
    parser.add_argument("--base", help="that all runs train; default: the embedded one")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name is, or has in it, one of these")
    parser.set_defaults(float32=False)  # a flag that some add
    add(parser)
    options = parser.parse_args()
    options.name = name
    published = options.results is None
    if published:
        options.results = RESULTS / f"{name}{'_float32' if options.float32 else ''}.jsonl"
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.image = options.results.with_suffix(".png")
    if published:
        options.image = HERE.parent / "docs" / "images" / options.image.name
    return options


def spread(runs: Mapping[str, dict], value: Callable[[dict], float | None], style: str) -> str:
    """Mean ± standard deviation over the seeds; a run without a value is left out."""
    values = [found for run in runs.values() if (found := value(run)) is not None]
    return mean_and_spread(values, style) if values else ""
