"""Compares runs: `devft compare`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hf_devft.run.comparison import common_loss, reached, read_curve
from hf_devft.run.plots import plot_curves
from hf_devft.run.tables import make_table


# Losses before any round that differ by more are of different things (our choice; rounding is far less).
SAME_START = 1.01


def main(runs: Sequence[str], plot: str) -> None:
    """Print what each run took until the lowest loss that all have reached, and save their curves.

    Args:
        runs: output folders; the first is what the others are compared with. plot: where the curves are saved.

    Raises:
        ValueError: fewer than two, or one whose loss is not known.
    """
    if len(runs) < 2:
        hint = ", separated by spaces" if any("," in run for run in runs) else ""
        raise ValueError(f"compare needs two runs or more, not {len(runs)}: give their output folders{hint}.")
    curves = {run: read_curve(run) for run in runs}
    loss = common_loss(list(curves.values()))
    starts = {run: curve[0].loss for run, curve in curves.items() if curve[0].rounds == 0}
    are_alike = not starts or max(starts.values()) <= SAME_START * min(starts.values())
    first, rows = reached(curves[runs[0]], loss), []
    for run, curve in curves.items():
        point = reached(curve, loss)
        fewer = f"{first.bytes / point.bytes:.2f}" if point.bytes and are_alike else ""
        lowest = min(each.loss for each in curve)
        work = (f"{point.flops / 1e12:.2f}", f"{point.server_flops / 1e12:.2f}", f"{point.seconds:.0f}")
        rows.append([run, f"{lowest:.3f}", str(point.rounds), f"{point.bytes / 1e6:.2f}", *work, fewer])
    titles = ["run", "lowest\nloss", "rounds", "MB", "client\nTFLOPs", "server\nTFLOPs", "seconds", "times\nfewer MB"]
    Console().print(
        make_table(f"until an evaluation at full depth found {loss:.3f} or less, against {runs[0]}", titles, rows)
    )
    if not are_alike:
        losses = ", ".join(f"{run} {loss:.3f}" for run, loss in starts.items())
        print(
            f"Losses before any round: {losses}. These runs differ in evaluation rows, base or initial adapter, so "
            "that their losses cannot be compared."
        )
    plot_curves(curves, loss).savefig(Path(plot), dpi=120)
    print(f"The curves are in {plot}")
