"""Cut GSM8K as `real_base.py` reads it.

    python benchmarks/make_gsm8k.py --gsm8k DIR --output_dir build/gsm8k

`DIR` has `train.jsonl` and `test.jsonl` (github.com/openai/grade-school-math, MIT-licensed). Writes `train.jsonl`, the
first 2,000 training rows, `server.jsonl`, the 192 after them, whose answers are not read as labels, and `test.jsonl`,
the first 200 test rows. Nothing of it is committed.
"""

import argparse
from itertools import islice
from pathlib import Path


PARTS = {"train": ("train", 0, 2000), "server": ("train", 2000, 2192), "test": ("test", 0, 200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, (source, *span) in PARTS.items():
        with (options.gsm8k / f"{source}.jsonl").open() as lines:
            (options.output_dir / f"{name}.jsonl").write_text("".join(islice(lines, *span)))


if __name__ == "__main__":
    main()
