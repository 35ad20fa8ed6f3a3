"""What a benchmark was run on, and where it writes."""

import argparse
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path


RESULTS = Path(__file__).parent / "results"


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The command line of a benchmark that writes a table."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS / f"{name}.md")
    return made


def mean_and_spread(values: Sequence[float], style: str) -> str:
    """Mean ± standard deviation, each formatted by `style`; of one value itself."""
    mean = style.format(statistics.mean(values))
    return f"{mean} ± {style.format(statistics.stdev(values))}" if len(values) > 1 else mean


def machine() -> str:
    """Day and kind of machine, as tables name them."""
    return f"{date.today()}, {os.cpu_count()} CPU cores, {platform.machine()}"


def publish(path: Path, lines: Sequence[str], command: str, *remarks: str, show: bool = True) -> None:
    """Write a table, with the command that made it, and show it."""
    text = "\n".join([*lines, "", ", ".join([f"`python benchmarks/{command}`", machine(), *remarks]) + "."])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    if show:
        print(text)
