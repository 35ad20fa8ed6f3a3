"""Every federated method alone and in DevFT's stages, on the quickstart's task, IID and not.

    python benchmarks/methods.py --seeds 0 1 2 --workers 2

Each run has 12 rounds (4 in each of three stages) of 2 clients of 20, 10 local steps of 16 examples, and every option
at its default but those of the configs. Writes `results/methods.jsonl`, `.md` and `docs/images/methods.png`; a run
that is already there is not repeated.
"""

import statistics

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from recipe_runs import COLUMNS, arguments, publish_runs, run_all, spread


METHODS = [
    "fedit", "ffa_lora", "fedsa_lora", "rolora", "flora", "fedex_lora", "flexlora", "hlora", "hetlora", "c2a", "dofit",
    "droppeft", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedadam", "fedyogi",
]  # fmt: skip
PARTITIONS = {"IID": ["iid"], "Dirichlet(0.3)": ["dirichlet", "--dirichlet_alpha", "0.3"]}
SHORT = ["--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "no"]
ALONE, STAGES = ("fedit.yaml", "12"), ("paper.yaml", "4")
ANCHORS = ["--grouping", "normalized_cut", "--fusion", "anchor"]
PROGFED = ("progfed.yaml", "4")


def name_of(method: str, kind: str, partition: str) -> str:
    return f"{method}, {kind}, {partition}"


def variants() -> dict[str, tuple[str, list[str]]]:
    """Name -> (config, overrides)."""
    found = {}
    for partition, how in PARTITIONS.items():
        shared = ["--partition", *how, *SHORT]
        for method in METHODS:
            for kind, (config, rounds) in (("alone", ALONE), ("stages", STAGES)):
                overrides = [*shared, "--stage_rounds", rounds, "--federated_method", method, *ANCHORS]
                found[name_of(method, kind, partition)] = (config, overrides)
        found[name_of("progfed", "stages", partition)] = (PROGFED[0], [*shared, "--stage_rounds", PROGFED[1]])
    return found


def table(results: dict[str, dict[str, dict]], partition: str) -> str:
    """A row per method: alone, and in stages."""
    names = list(COLUMNS)
    lines = [
        f"| {partition} | {' | '.join(f'{name}, {kind}' for name in names for kind in ('alone', 'DevFT'))} |",
        f"|---|{'---:|' * 2 * len(names)}",
    ]
    for method in [*METHODS, "progfed"]:
        runs = [results.get(name_of(method, kind, partition), {}) for kind in ("alone", "stages")]
        cells = [spread(each, *column) for column in COLUMNS.values() for each in runs]
        if any(runs):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, dict]]) -> Figure:
    """Exact match against bytes and against FLOPs: an arrow from each method alone to the method in stages."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for row, partition in enumerate(PARTITIONS):
        for column, axis in enumerate(("MB sent", "TFLOPs")):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for index, method in enumerate([*METHODS, "progfed"]):
                ends = []
                for kind, marker in (("alone", "o"), ("stages", "*")):
                    runs = results.get(name_of(method, kind, partition), {}).values()
                    if not runs:
                        continue
                    x = statistics.mean(COLUMNS[axis][0](run) for run in runs)
                    y = 100 * statistics.mean(COLUMNS["exact match"][0](run) for run in runs)
                    axes.plot(x, y, marker, color=f"C{index % 10}", markersize=6 if marker == "o" else 10)
                    ends.append((x, y))
                if ends:
                    axes.annotate(method, ends[0], fontsize="x-small", xytext=(4, 3), textcoords="offset points")
                    axes.plot(*zip(*ends, strict=True), "-", color=f"C{index % 10}", alpha=0.3)
            axes.set(xlabel=axis, ylabel="exact match, %", title=f"{partition}: alone (●) and with DevFT's stages (★)")
            axes.set_xscale("log")
            for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                ticks(ScalarFormatter())
            axes.tick_params(axis="x", which="both", labelrotation=30, labelsize="x-small")
            axes.grid(alpha=0.3)
    return figure


def main() -> None:
    options = arguments("methods", __doc__)
    results = run_all(variants(), options)
    text = "\n".join(table(results, partition) for partition in PARTITIONS)
    publish_runs(options, results, text, plot(results))


if __name__ == "__main__":
    main()
