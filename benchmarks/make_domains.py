"""Make three natural domains of GSM8K and GPTeacher: sums, code and role play, for `domains.py`.

    python benchmarks/make_domains.py --gsm8k DIR --gpteacher DIR --output_dir build/domains

`DIR` has `train.jsonl` and `test.jsonl` (github.com/openai/grade-school-math), and `codegen.json` and `roleplay.json`
(github.com/teknium1/GPTeacher), all MIT-licensed. Writes `train.jsonl`, 700 rows of each domain over seven owners,
`test.jsonl`, 200 of each in turns, and `server.jsonl`, 64 of each, whose answers are not read as labels. Nothing of it
is committed.
"""

import argparse
from itertools import chain
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from hf_devft.tasks.data import load_files, to_known_columns


OWNERS, ROWS, TEST, SERVER = 7, 700, 200, 64
COLUMNS = ["prompt", "completion", "domain"]


def domain(name: str, file: Path) -> Dataset:
    """Rows of a file in an order that is always the same."""
    dataset = load_files([str(file)], to_known_columns).shuffle(seed=0)
    return dataset.add_column("domain", [name] * len(dataset)).select_columns(COLUMNS)


def owned(rows: Dataset) -> Dataset:
    return rows.add_column("owner", [f"{row['domain']}-{index % OWNERS}" for index, row in enumerate(rows)])


def in_turns(datasets: list[Dataset]) -> Dataset:
    """A row of each after the other, so that the first ones are of all."""
    length = len(datasets[0])
    turns = chain.from_iterable(range(place, length * len(datasets), length) for place in range(length))
    return concatenate_datasets(datasets).select(list(turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--gpteacher", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    files = {
        "gsm8k": options.gsm8k / "train.jsonl",
        "codegen": options.gpteacher / "codegen.json",
        "roleplay": options.gpteacher / "roleplay.json",
    }
    rows = {name: domain(name, file) for name, file in files.items()}
    # Of GSM8K the published test rows, of the others rows that no client has.
    tests = rows | {"gsm8k": domain("gsm8k", options.gsm8k / "test.jsonl")}
    end = ROWS + SERVER
    parts = {
        "train": concatenate_datasets([owned(own.select(range(ROWS))) for own in rows.values()]),
        "server": in_turns([own.select(range(ROWS, end)) for own in rows.values()]),
        "test": in_turns([own.select(range(end, end + TEST)) for own in tests.values()]),
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, dataset in parts.items():
        dataset.to_json(options.output_dir / f"{name}.jsonl")


if __name__ == "__main__":
    main()
