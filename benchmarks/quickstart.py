"""DevFT against FedIT at the same number of rounds, on the quickstart task.

    python benchmarks/quickstart.py --seeds 0 1 2

Runs every variant with every seed through the recipe, one after another, and writes `results/quickstart.jsonl` and
`results/quickstart.md` beside this file. A run that is already there is not repeated.
"""

from recipe_runs import COLUMNS, arguments, publish_runs, run_all, table


BALANCED = ["--grouping", "normalized_cut"]
ANCHORS = [*BALANCED, "--fusion", "anchor", "--transfer", "broadcast"]
CALIBRATED = ["--grouping", "calibrated", "--fusion", "anchor", "--transfer", "anchor"]
# Name -> (config, overrides). A round is 2 clients of 10 local steps of 16 examples.
VARIANTS = {
    "FedIT, 30 rounds (`fedit.yaml`)": ("fedit.yaml", []),
    "FedIT, 18 rounds: about DevFT's bytes": ("fedit.yaml", ["--stage_rounds", "18"]),
    "DevFT, 30 rounds, the paper's rules": ("paper.yaml", []),
    "DevFT, 30 rounds, the paper's rules with balanced groups": ("paper.yaml", BALANCED),
    "DevFT, 30 rounds, balanced groups, anchor fusion": ("paper.yaml", ANCHORS),
    "DevFT, 30 rounds, calibrated groups, anchors only": ("paper.yaml", CALIBRATED),
}
SHOWN = COLUMNS | {
    "seconds in rounds": (lambda run: run["totals"]["seconds"], "{:.0f}"),
    "seconds in all": (lambda run: run["wall_seconds"], "{:.0f}"),
}


def main() -> None:
    options = arguments("quickstart", __doc__)
    results = run_all(VARIANTS, options)
    publish_runs(options, results, table(results, SHOWN))


if __name__ == "__main__":
    main()
