"""DevFT's own rules and sizes, one config option at a time, on the quickstart's task.

    python benchmarks/ablations.py --seeds 0 1 2 --workers 2

All of grouping x fusion x transfer (4, 8 and 16 layers), then β, the first stage's capacity and the growth factor with
the paper's rules. Each run has 12 rounds in all stages together, Dirichlet(0.5). Writes `results/ablations.jsonl` and
`.md`; a run that is already there is not repeated.
"""

from itertools import product

from recipe_runs import arguments, publish_runs, run_all, table


GROUPINGS = ("normalized_cut", "even", "random", "calibrated")
FUSIONS = ("differential", "mean", "sum", "anchor")
TRANSFERS = ("broadcast", "anchor", "split")
SHORT = ["--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "no", "--stage_rounds", "4"]
PAPER = [*SHORT, "--grouping", "normalized_cut", "--fusion", "differential", "--transfer", "broadcast"]


def rules(grouping: str, fusion: str, transfer: str) -> list[str]:
    return [*SHORT, "--grouping", grouping, "--fusion", fusion, "--transfer", transfer]


def stages(*layers: int) -> list[str]:
    """12 rounds, evenly over these stages."""
    rounds = [12 // len(layers) + (index < 12 % len(layers)) for index in range(len(layers))]
    return [*PAPER, "--stage_layers", *map(str, layers), "--stage_rounds", *map(str, rounds)]


# The paper's rules and the sizes first: a stopped benchmark has them.
VARIANTS = {"normalized_cut, differential, broadcast": PAPER}
VARIANTS |= {f"β = {beta}": [*PAPER, "--fusion_beta", str(beta)] for beta in (0.0, 0.05, 0.3)}  # the paper's: 0.1
VARIANTS |= {
    "16 layers (FedIT)": stages(16),
    "2, 4, 8, 16 layers": stages(2, 4, 8, 16),
    "8, 16 layers": stages(8, 16),
    "12, 16 layers": stages(12, 16),
    "4, 6, 9, 13, 16 layers (growth 1.5)": stages(4, 6, 9, 13, 16),
    "4, 16 layers (growth 4)": stages(4, 16),
}
VARIANTS |= {
    f"{grouping}, {fusion}, {transfer}": rules(grouping, fusion, transfer)
    for transfer, fusion, grouping in product(TRANSFERS, FUSIONS, GROUPINGS)
    if (grouping, fusion, transfer) != (GROUPINGS[0], FUSIONS[0], TRANSFERS[0])
}


def main() -> None:
    options = arguments("ablations", __doc__)
    results = run_all(
        {name: ("paper.yaml", overrides) for name, overrides in VARIANTS.items()},
        options,
    )
    publish_runs(options, results, table(results, title="grouping, fusion, transfer"))


if __name__ == "__main__":
    main()
