"""What DevFT and FedIT cost until they reach the same loss, on the quickstart's task.

    python benchmarks/to_target.py --seeds 0 1 2 --workers 2

In two regimes: "many rows", the quickstart's 4,000, of which FedIT has not seen enough when it stops, and "few rows",
400 over the 20 clients, on which it stops improving. Every run is evaluated at full depth after every round in which
the model has all its layers, and at every stage's end. A target is a loss; FedIT's cost is that of whichever of its
runs is the first to reach it, by each measure, so that it has the learning rate and the length that suit it best.
Writes `results/to_target.jsonl`, `.md` and `docs/images/to_target.png`; a run that is already there is not
repeated.
"""

import statistics

from machine import mean_and_spread
from matplotlib.figure import Figure
from recipe_runs import COLUMNS, arguments, publish_runs, run_all
from recipe_runs import table as plain_table


LLAMA_LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
LINEAR = ["--lr_scheduler_type", "linear"]
OFTEN = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "false", "--save_strategy", "no"]
INT4 = ["--wire_dtype", "int4"]
FEW = ["--task_rows", "400"]
TWENTY = ["--local_steps", "20"]
ALPHA_32 = ["--lora_alpha", "32"]
# Prompts without answers on the server, as many steps as it takes to go through them twice or more.
DISTILLED = ["--learning_rate", "4e-3", "--distillation_steps", "60", "--calibration_samples"]
LONGER = ["--distillation_steps", "240"]
ANCHORS = ["--fusion", "anchor", "--adapter_fusion", "anchor", "--transfer", "anchor"]
FOUR_LAYERS = ["--lora_layers", *"0 4 8 12".split(), "--lora_target_modules", *LLAMA_LINEAR]
ENDING = "--early_stopping_patience 2 --load_best_model_at_end true --save_strategy steps --save_steps 1".split()
PISSA = ["--init_lora_weights", "pissa", *ANCHORS]
# Regime -> losses to reach.
TARGETS = {"many rows": (0.5, 0.3, 0.2), "few rows": (0.8, 0.6, 0.5)}
COSTS = {
    "rounds": "rounds", "seconds": "time", "bytes": "bytes", "client_flops": "clients' FLOPs", "flops": "all FLOPs",
}  # fmt: skip
BASELINE = "FedIT,"  # with as large an adapter as the others have


def fedit(rounds: int, rate: str, *more: str) -> tuple[str, list[str]]:
    return "fedit.yaml", [*OFTEN, "--stage_rounds", str(rounds), "--learning_rate", rate, *more]


def devft(stages: str, rounds: str, rates: str, *more: str) -> tuple[str, list[str]]:
    names = ("--stage_layers", stages), ("--stage_rounds", rounds), ("--stage_learning_rates", rates)
    return "quickstart.yaml", [*OFTEN, *(word for name, values in names for word in (name, *values.split())), *more]


def distilled(rounds: str, *more: str) -> tuple[str, list[str]]:
    """The rules of `distilled.yaml`, on 512 prompts in 240 steps."""
    return devft("4 16", rounds, "6e-3 4e-3", *LINEAR, *DISTILLED, "512", *LONGER, *more)


VARIANTS = {
    "many rows": {
        "FedIT, 2e-3, 16 rounds": fedit(16, "2e-3"),
        "FedIT, 6e-3 linear, 8 rounds": fedit(8, "6e-3", *LINEAR),
        "FedIT, 6e-3 linear, 16 rounds": fedit(16, "6e-3", *LINEAR),
        "FedIT, 2e-3, 30 rounds": fedit(30, "2e-3"),
        "FedIT, 6e-3 linear, 30 rounds": fedit(30, "6e-3", *LINEAR),
        "FedIT, 6e-3 linear, 16 rounds, alpha 32": fedit(16, "6e-3", *LINEAR, *ALPHA_32),
        "FedIT, 6e-3 linear, 16 rounds, int4": fedit(16, "6e-3", *LINEAR, *INT4),
        "FedIT, 6e-3 linear, 30 rounds, int4": fedit(30, "6e-3", *LINEAR, *INT4),
        "DevFT, the paper's rules with balanced groups, 4-8-16": (
            "paper.yaml",
            [*OFTEN, "--grouping", "normalized_cut"],
        ),
        "DevFT 4-16, 16 + 8 rounds, 6e-3, 9e-3 linear": devft("4 16", "16 8", "6e-3 9e-3", *LINEAR),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 9e-3 linear": devft("4 16", "12 4", "6e-3 9e-3", *LINEAR),
        "DevFT 4-8-16, 12 + 4 + 6 rounds, 6e-3, 8e-3, 1e-2 linear": devft(
            "4 8 16", "12 4 6", "6e-3 8e-3 1e-2", *LINEAR
        ),
        "FedIT of rank 4, 6e-3 linear, 16 rounds": fedit(16, "6e-3", *LINEAR, "--lora_r", "4"),
        "FedIT of rank 2, 6e-3 linear, 16 rounds": fedit(16, "6e-3", *LINEAR, "--lora_r", "2", "--lora_alpha", "8"),
        "FedIT of rank 2, alpha 16, 6e-3 linear, 16 rounds": fedit(16, "6e-3", *LINEAR, "--lora_r", "2"),
        "FedIT of rank 1, alpha 16, 6e-3 linear, 16 rounds": fedit(16, "6e-3", *LINEAR, "--lora_r", "1"),
        "FedIT of rank 4, 6e-3 linear, 16 rounds, int4": fedit(16, "6e-3", *LINEAR, "--lora_r", "4", *INT4),
        "FedIT of rank 2, alpha 16, 6e-3 linear, 16 rounds, int4": fedit(16, "6e-3", *LINEAR, "--lora_r", "2", *INT4),
        "FedIT on 4 of the layers, 6e-3 linear, 16 rounds": fedit(16, "6e-3", *LINEAR, *FOUR_LAYERS),
        "FedIT of 20 local steps, 6e-3 linear, 8 rounds": fedit(8, "6e-3", *LINEAR, *TWENTY),
        "FedIT, PiSSA, 3e-3 linear, 12 rounds": fedit(12, "3e-3", *LINEAR, *PISSA),
        "DevFT 4-8-16, 4 + 4 + 6 rounds, 6e-3 linear, to anchors": devft(
            "4 8 16", "4 4 6", "6e-3 6e-3 6e-3", *LINEAR, *ANCHORS
        ),
        "DevFT 4-8-16, 4 + 4 + 6 rounds, 3e-3 linear, PiSSA": devft(
            "4 8 16", "4 4 6", "3e-3 3e-3 3e-3", *LINEAR, *PISSA
        ),
        "DevFT 4-8-16, 4 + 4 + 6 rounds, 3e-3 linear, PiSSA, int4": devft(
            "4 8 16", "4 4 6", "3e-3 3e-3 3e-3", *LINEAR, *PISSA, *INT4
        ),
        "DevFT 4-16, 16 + 8 rounds, 6e-3, 9e-3 linear, int4": devft("4 16", "16 8", "6e-3 9e-3", *LINEAR, *INT4),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled": devft(
            "4 16", "12 4", "6e-3 4e-3", *LINEAR, *DISTILLED, "512"
        ),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps": distilled("12 4"),
        "DevFT 4-16, 16 + 2 rounds, 6e-3, 4e-3 linear, distilled in 240 steps": distilled("16 2"),
        "DevFT 4-16, 24 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps": distilled("24 4"),
        "DevFT 4-16, 36 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps": distilled("36 4"),
        "DevFT 4-16, 36 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps, int4": distilled("36 4", *INT4),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps, int4": distilled("12 4", *INT4),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps, rank 4": distilled(
            "12 4", "--lora_r", "4"
        ),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps, rank 4, int4": distilled(
            "12 4", "--lora_r", "4", *INT4
        ),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps, rank 2": distilled(
            "12 4", "--lora_r", "2"
        ),
        "DevFT 4-16, 8 + 2 rounds of 20 local steps, 6e-3, 4e-3 linear, distilled in 240 steps": distilled(
            "8 2", *TWENTY
        ),
        "DevFT 4-16, 16 + 4 rounds, 6e-3 linear, distilled": devft(
            "4 16", "16 4", "6e-3 6e-3", *LINEAR, *DISTILLED, "512"
        ),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled, alpha 32": devft(
            "4 16", "12 4", "6e-3 4e-3", *LINEAR, *DISTILLED, "512", *ALPHA_32
        ),
        "DevFT 4-16, 16 + 4 rounds, 6e-3 linear, distilled, alpha 32": devft(
            "4 16", "16 4", "6e-3 6e-3", *LINEAR, *DISTILLED, "512", *ALPHA_32
        ),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled, rank 2": devft(
            "4 16", "12 4", "6e-3 4e-3", *LINEAR, *DISTILLED, "512", "--lora_r", "2"
        ),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled, rank 1": devft(
            "4 16", "12 4", "6e-3 4e-3", *LINEAR, *DISTILLED, "512", "--lora_r", "1"
        ),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled, rank 4": devft(
            "4 16", "12 4", "6e-3 4e-3", *LINEAR, *DISTILLED, "512", "--lora_r", "4"
        ),
        "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled, int4": devft(
            "4 16", "12 4", "6e-3 4e-3", *LINEAR, *DISTILLED, "512", *INT4
        ),
        "DevFT 4-16, 8 + 2 rounds of 20 local steps, 6e-3, 4e-3 linear, distilled": devft(
            "4 16", "8 2", "6e-3 4e-3", *LINEAR, *DISTILLED, "512", *TWENTY
        ),
        "DevFT 4-16, up to 20 + 8 rounds, 4e-3, stages end themselves, distilled": devft(
            "4 16", "20 8", "4e-3 2e-3", *DISTILLED, "512", *ENDING
        ),
    },
    "few rows": {
        "FedIT, 2e-3, 30 rounds": fedit(30, "2e-3", *FEW),
        "FedIT, 6e-3 linear, 12 rounds": fedit(12, "6e-3", *LINEAR, *FEW),
        "FedIT, 6e-3 linear, 30 rounds": fedit(30, "6e-3", *LINEAR, *FEW),
        "FedIT, 6e-3 linear, 30 rounds, alpha 32": fedit(30, "6e-3", *LINEAR, *FEW, *ALPHA_32),
        "DevFT 4-16, 20 + 12 rounds, 6e-3, 9e-3 linear": devft("4 16", "20 12", "6e-3 9e-3", *LINEAR, *FEW),
        "DevFT 4-8-16, 14 + 6 + 10 rounds, 6e-3, 8e-3, 1e-2 linear": devft(
            "4 8 16", "14 6 10", "6e-3 8e-3 1e-2", *LINEAR, *FEW
        ),
        "DevFT 4-16, 16 + 6 rounds, 6e-3, 4e-3 linear, distilled": devft(
            "4 16", "16 6", "6e-3 4e-3", *LINEAR, *FEW, *DISTILLED, "128"
        ),
        "DevFT 4-16, 16 + 6 rounds, 6e-3, 4e-3 linear, distilled in 240 steps": devft(
            "4 16", "16 6", "6e-3 4e-3", *LINEAR, *FEW, *DISTILLED, "128", *LONGER
        ),
        "DevFT 4-16, 30 + 6 rounds, 6e-3, 4e-3 linear, distilled in 240 steps on 512 prompts": distilled("30 6", *FEW),
        "DevFT 4-16, 30 + 12 rounds, 6e-3, 4e-3 linear, distilled in 240 steps on 512 prompts": distilled(
            "30 12", *FEW
        ),
        "DevFT 4-16, 45 + 6 rounds, 6e-3, 4e-3 linear, distilled in 240 steps on 512 prompts": distilled("45 6", *FEW),
        "DevFT 4-16, 20 + 6 rounds, 6e-3, 4e-3 linear, distilled": devft(
            "4 16", "20 6", "6e-3 4e-3", *LINEAR, *FEW, *DISTILLED, "128"
        ),
        "DevFT 4-16, 16 + 12 rounds, 6e-3 linear, distilled": devft(
            "4 16", "16 12", "6e-3 6e-3", *LINEAR, *FEW, *DISTILLED, "128"
        ),
        "DevFT 4-16, 16 + 6 rounds, 6e-3, 4e-3 linear, distilled, alpha 32": devft(
            "4 16", "16 6", "6e-3 4e-3", *LINEAR, *FEW, *DISTILLED, "128", *ALPHA_32
        ),
    },
}

# What the picture shows of them.
DRAWN = (
    "FedIT, 2e-3, 30 rounds",
    "FedIT, 6e-3 linear, 30 rounds",
    "FedIT, 6e-3 linear, 16 rounds, int4",
    "FedIT of rank 2, 6e-3 linear, 16 rounds",
    "DevFT, the paper's rules with balanced groups, 4-8-16",
    "DevFT 4-8-16, 12 + 4 + 6 rounds, 6e-3, 8e-3, 1e-2 linear",
    "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps",
    "DevFT 4-16, 36 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps",
    "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled in 240 steps, int4",
    "DevFT 4-16, 20 + 12 rounds, 6e-3, 9e-3 linear",
    "DevFT 4-16, 30 + 6 rounds, 6e-3, 4e-3 linear, distilled in 240 steps on 512 prompts",
    "DevFT 4-16, 45 + 6 rounds, 6e-3, 4e-3 linear, distilled in 240 steps on 512 prompts",
)


def cost(run: dict, target: float, measure: str) -> float | None:
    """What a run took until it first reached `target`, or None."""
    return next((point[measure] for point in run["curve"] if point["loss"] <= target), None)


def ratio(runs: dict[str, dict], rivals: list[dict[str, dict]], target: float, measure: str) -> str:
    """How many times as much FedIT took, mean ± s.d. over the seeds; what does not reach the target in every seed says
    so."""
    ratios = []
    for seed, run in runs.items():
        own = cost(run, target, measure)
        others = [cost(rival[seed], target, measure) for rival in rivals if seed in rival]
        others = [other for other in others if other is not None]
        if own is None or not others:
            return "not in every seed" if own is None else "FedIT not in every seed"
        ratios.append(min(others) / own)
    return mean_and_spread(ratios, "{:.2f}")


def table(title: str, results: dict[str, dict[str, dict]], targets: tuple[float, ...]) -> str:
    """A row for each variant that has run and each target: how much cheaper than FedIT it is there."""
    lines = [
        f"| {title} | lowest loss | exact match | target | {' | '.join(COSTS.values())} |",
        f"|---|---:|---:|---:|{'---:|' * len(COSTS)}",
    ]
    rivals = [runs for name, runs in results.items() if name.startswith(BASELINE) and "int4" not in name]
    for name, runs in results.items():
        if not runs:
            continue
        lowest = statistics.mean(min(point["loss"] for point in run["curve"]) for run in runs.values())
        match = statistics.mean(run["metrics"]["eval_full_exact_match"] for run in runs.values())
        for index, target in enumerate(targets):
            cells = " | ".join(ratio(runs, rivals, target, measure) for measure in COSTS)
            about = f"{name} | {lowest:.3f} | {match:.1%}" if index == 0 else " | |"
            lines.append(f"| {about} | {target} | {cells} |")
    return "\n".join(lines) + "\n"


# What a run has come to when it is over.
END = {
    "rounds": (lambda run: run["curve"][-1]["rounds"], "{:.0f}"),
    "exact match": COLUMNS["exact match"],
    "loss": COLUMNS["eval loss"],
    "MB sent": COLUMNS["MB sent"],
    "clients' TFLOPs": (lambda run: run["curve"][-1]["client_flops"] / 1e12, "{:.2f}"),
    "with the server's": (lambda run: run["curve"][-1]["flops"] / 1e12, "{:.2f}"),
}


def plot(results: dict[str, dict[str, dict]]) -> Figure:
    """Loss at full depth against bytes and against the clients' FLOPs, a line for each drawn run of the first seed."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    for row, regime in enumerate(VARIANTS):
        for column, (measure, label, unit) in enumerate(
            (("bytes", "MB sent", 1e6), ("client_flops", "clients' TFLOPs", 1e12))
        ):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for index, name in enumerate(name for name in DRAWN if name in VARIANTS[regime]):
                for run in list(results[f"{regime}: {name}"].values())[:1]:
                    x, y = zip(*((point[measure] / unit, point["loss"]) for point in run["curve"]), strict=True)
                    style = "--" if name.startswith("FedIT") else "o-"
                    axes.plot(x, y, style, color=f"C{index}", markersize=3, label=name)
            axes.set(xlabel=label, ylabel="loss at full depth", yscale="log", title=regime)
            axes.set_xscale("log" if measure == "bytes" else "linear")
            axes.grid(alpha=0.3, which="both")
            if column == 1 and axes.get_lines():
                axes.legend(fontsize="x-small", loc="upper right")
    return figure


def main() -> None:
    options = arguments("to_target", __doc__)
    variants = {f"{regime}: {name}": how for regime, named in VARIANTS.items() for name, how in named.items()}
    results = run_all(variants, options, curve=True)
    text = ""
    for regime, named in VARIANTS.items():
        runs = {name: results[f"{regime}: {name}"] for name in named}
        text += f"{table(regime, runs, TARGETS[regime])}\n{plain_table(runs, END, f'{regime}, at the end')}\n"
    publish_runs(options, results, text, plot(results))


if __name__ == "__main__":
    main()
