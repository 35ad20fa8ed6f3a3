"""Some of `to_target.py`'s runs on another base, such as one that was not grown, whose layers are no copies:

    python recipes/pretrain_base.py --output_dir build/flat \\
        --phase_layers 16 --phase_steps 2500 --phase_rates 2e-3
    python recipes/pretrain_base.py --output_dir build/flat --layer_drop 0 \\
        --phase_layers 16 16 --phase_steps 2500 2500 --phase_rates 2e-3 2e-3
    python benchmarks/other_base.py --base build/flat/final --workers 2

(The second command goes on from where the first has stopped.) Writes `results/other_base.jsonl` and `.md`; a run that
is already there is not repeated.
"""

from recipe_runs import arguments, publish_runs, run_all
from recipe_runs import table as plain_table
from to_target import ALPHA_32, DISTILLED, END, LINEAR, LONGER, VARIANTS, devft, table


CHOSEN = (
    "FedIT, 2e-3, 16 rounds",
    "FedIT, 6e-3 linear, 16 rounds",
    "FedIT, 6e-3 linear, 30 rounds",
    "FedIT, 6e-3 linear, 16 rounds, alpha 32",
    "DevFT, the paper's rules with balanced groups, 4-8-16",
    "DevFT 4-16, 12 + 4 rounds, 6e-3, 9e-3 linear",
    "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled",
    "DevFT 4-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled, alpha 32",
)
# Where fewer layers cannot stand for the others: half of them, and chosen by what the base loses without the rest.
HALF = devft("8 16", "12 4", "6e-3 4e-3", *LINEAR, *DISTILLED, "512")
# Layers that are taught to stand for all before anything is learned on them, on prompts of the task without answers.
EVEN = ["--grouping", "even", *LINEAR, *DISTILLED, "1024", *LONGER]
HEALED = ["--healing_steps", "1200", "--healing_learning_rate", "2e-3", *EVEN]
MORE = {
    "DevFT 8-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled": HALF,
    "DevFT 8-16, 12 + 4 rounds, 6e-3, 4e-3 linear, distilled, calibrated groups": (
        HALF[0],
        [*HALF[1], "--grouping", "calibrated", "--transfer", "anchor"],
    ),
    "DevFT 4-16, 20 + 4 rounds, even groups, distilled in 240 steps": devft("4 16", "20 4", "6e-3 4e-3", *EVEN),
    "DevFT 4-16, 12 + 4 rounds, even groups, healed": devft("4 16", "12 4", "6e-3 4e-3", *HEALED),
    "DevFT 4-16, 20 + 4 rounds, even groups, healed": devft("4 16", "20 4", "6e-3 4e-3", *HEALED),
    "DevFT 4-16, 20 + 4 rounds, even groups, healed, alpha 32": devft("4 16", "20 4", "6e-3 4e-3", *HEALED, *ALPHA_32),
    "DevFT 4-16, 50 + 4 rounds, even groups, healed, alpha 32": devft("4 16", "50 4", "6e-3 4e-3", *HEALED, *ALPHA_32),
}
TARGETS = (1.0, 0.7, 0.5)
FIRST_STAGE = {
    "after stage 1, submodel": (lambda run: run["stages"][0]["metrics"].get("eval_loss", float("nan")), "{:.3f}"),
    "at full depth": (lambda run: run["stages"][0]["metrics"]["eval_full_loss"], "{:.3f}"),
}


def main() -> None:
    options = arguments("other_base", __doc__)
    if options.base is None:
        raise SystemExit("give the other base: --base build/flat/final")
    results = run_all({name: VARIANTS["many rows"][name] for name in CHOSEN} | MORE, options, curve=True)
    staged = {name: runs for name, runs in results.items() if name.startswith("DevFT")}
    tables = (
        table("many rows", results, TARGETS),
        plain_table(staged, FIRST_STAGE),
        plain_table(results, END, "at the end"),
    )
    text = "\n".join(tables)
    publish_runs(options, results, text)


if __name__ == "__main__":
    main()
