"""What bad clients do to a run, and what each rule of aggregation saves: attack x rule x bad clients of 10.

    python benchmarks/robustness.py --workers 2

The quickstart's task, 4 layers for 6 rounds and 16 for 2; ten clients that hold different tasks, all of them in each
round, as bad clients do not wait to be sampled. The trimmed mean and Krum are set for three bad clients, the
most that Krum allows. Writes
`results/robustness.jsonl` and `.md`; a run that is already there is not repeated.
"""

import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from attacks import ATTACKS, attack, backdoor_success
from machine import machine, mean_and_spread
from machine import parser as make_parser

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import make_trainer


CONFIG = Path(__file__).parent.parent / "recipes" / "configs" / "quickstart.yaml"
CLIENTS = 10
FLAGS = """
    --stage_layers 4 16 --stage_rounds 6 2 --stage_learning_rates 8e-3 6e-3 --num_clients 10 --clients_per_round 10
    --local_steps 5 --per_device_train_batch_size 8 --round_quorum 10 --eval_strategy no --eval_on_start false
    --save_strategy no --disable_tqdm true
""".split()
RULES = {
    "mean": ["fedit"],
    "median": ["median"],
    "trimmed mean": ["trimmed_mean", '{"trimmed_fraction": 0.3}'],
    "geometric median": ["geometric_median"],
    "Krum": ["krum", '{"byzantine": 3}'],
    "multi-Krum": ["multi_krum", '{"byzantine": 3}'],
    "norm clipping": ["norm_clipping"],
}
BAD = (2, 4, 1)  # the most telling first

# Attack, rule, bad clients, seed.
Case = tuple[str, str, int, int]


def cases(seeds: list[int]) -> list[Case]:
    """All runs, those without a bad client first."""
    clean = [("none", rule, 0, seed) for seed in seeds for rule in RULES]
    return clean + [(name, rule, bad, seed) for seed in seeds for bad in BAD for name in ATTACKS for rule in RULES]


def run(case: Case, threads: int) -> dict:
    """One run: exact match and loss at full depth on honest rows, and how often the backdoor opens."""
    torch.set_num_threads(threads)
    name, rule, bad, seed = case
    if bad:
        attack(*ATTACKS[name], bad=set(range(bad)))
    method, *options = RULES[rule]
    flags = [*FLAGS, "--federated_method", method, "--seed", str(seed)]
    flags += ["--federated_method_kwargs", *options] if options else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(*parse_arguments([*flags, "--output_dir", folder], CONFIG))
        try:
            trainer.train()
        except RuntimeError as error:  # a QuorumError, where clients diverge from what they are sent
            return {"exact match": 0.0, "loss": None, "stopped": str(error)}
        metrics = trainer.stages[-1].metrics
        found = {"exact match": metrics["eval_full_exact_match"], "loss": metrics["eval_full_loss"]}
        if name == "backdoor":
            found["backdoor"] = backdoor_success(trainer.model.eval(), trainer.eval_dataset)
    return found


def run_all(path: Path, seeds: list[int], workers: int, threads: int) -> dict[Case, dict]:
    """Every run that the results do not have, added to them when it is over; returns all."""
    known = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        *case, result = json.loads(line)
        known[tuple(case)] = result
    # A process for each run: attacks stay in force in theirs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool, path.open("a") as file:
        asked = {pool.submit(run, case, threads): case for case in cases(seeds) if case not in known}
        for future in as_completed(asked):
            known[asked[future]] = result = future.result()
            file.write(json.dumps([*asked[future], result]) + "\n")
            file.flush()
            print(*asked[future], result, flush=True)
    return known


def table(results: dict[Case, dict]) -> list[str]:
    """A row for each attack and number of bad clients, a column for each rule: exact match, and of the backdoor how
    often it opens."""
    lines = [f"| attack | bad of {CLIENTS} | {' | '.join(RULES)} |", f"|---|---:|{'---:|' * len(RULES)}"]
    rows = [("none", 0, "exact match"), *((name, bad, "exact match") for name in ATTACKS for bad in sorted(BAD))]
    rows += [("backdoor", bad, "backdoor") for bad in sorted(BAD)]
    for name, bad, of in rows:
        cells = []
        for rule in RULES:
            values = [found.get(of, 0.0) for case, found in results.items() if case[:3] == (name, rule, bad)]
            cells.append(mean_and_spread(values, "{:.1%}") if values else "")
        opens = ", opens" if of == "backdoor" else ""
        lines.append(f"| {name}{opens} | {bad} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = make_parser("robustness", __doc__)
    parser.set_defaults(results=parser.get_default("results").with_suffix(".jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of a run; default: its share of the cores")
    options = parser.parse_args()
    threads = options.threads or max(1, (multiprocessing.cpu_count() or 1) // options.workers)
    text = table(run_all(options.results, options.seeds, options.workers, threads))
    seeds = ", ".join(map(str, options.seeds))
    text += ["", f"`python benchmarks/robustness.py`, {machine()}; exact match on 200 new tasks, seeds {seeds}."]
    options.results.with_suffix(".md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
