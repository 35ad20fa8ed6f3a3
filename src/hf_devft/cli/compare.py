"""Compares runs: `devft compare`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hf_devft.run.comparison import common_loss, reached, read_curve
from hf_devft.run.plots import plot_curves
from hf_devft.run.tables import make_table


# Losses before any round that differ by more are of other rows or another base (our choice; rounding is far less).
SAME_START = 1.01


def main(runs: Sequence[str], plot: str) -> None:
    """Print what each run took until the lowest loss that all have reached, and save their curves.

    Args:
        runs: output folders; the first is what the others are compared with. plot: where the curves are saved.

    Raises:
        ValueError: fewer than two, or one whose loss is not known.
    """
    if len(runs) < 2:
        raise ValueError(f"compare needs two runs or more, not {len(runs)}: give their output folders.")
    curves = {run: read_curve(run) for run in runs}
    loss = common_loss(list(curves.values()))
    first, rows = reached(curves[runs[0]], loss), []
    for run, curve in curves.items():
        point = reached(curve, loss)
        fewer = f"{first.megabytes / point.megabytes:.2f}" if point.megabytes else ""
        lowest = min(each.loss for each in curve)
        work = (f"{point.teraflops:.2f}", f"{point.server_teraflops:.2f}", f"{point.seconds:.0f}")
        rows.append([run, f"{lowest:.3f}", str(point.rounds), f"{point.megabytes:.2f}", *work, fewer])
    titles = ["run", "lowest\nloss", "rounds", "MB", "client\nTFLOPs", "server\nTFLOPs", "seconds", "times\nfewer MB"]
    Console().print(
        make_table(f"until an evaluation loss of {loss:.3f} at full depth, against {runs[0]}", titles, rows)
    )
    starts = [curve[0].loss for curve in curves.values() if curve[0].rounds == 0]
    if starts and max(starts) > SAME_START * min(starts):
        losses = ", ".join(f"{loss:.3f}" for loss in starts)
        print(f"Before any round their losses were {losses}: they have other rows or another base, and say little.")
    plot_curves(curves, loss).savefig(Path(plot), dpi=120)
    print(f"The curves are in {plot}")
