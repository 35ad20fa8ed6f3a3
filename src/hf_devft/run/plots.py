"""The curve of a run, and of runs side by side."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from hf_devft.configuration import StageConfig
from hf_devft.federation.ledger import Ledger
from hf_devft.run.comparison import Point


def plot_run(
    log_history: list[dict],
    ledger: Ledger,
    stages: list[StageConfig],
    baseline: Mapping[str, Sequence[Point]] | None = None,
) -> Figure:
    """Plot loss against megabytes sent: each stage's submodel as a line, full depth at the stages' ends as points.

    Args:
        log_history: the Trainer's (`step` is the round).
        ledger: for the bytes sent until a round.
        stages: the finished stages.
        baseline: other runs by name, of which full depth is a line.
    """
    figure, axes = _against_megabytes("loss")
    sent = lambda rows: [ledger.bytes_until(row["step"]) / 1e6 for row in rows]  # noqa: E731
    for stage in stages:
        rows = [row for row in log_history if row.get("stage") == stage.stage]
        color, depth = f"C{stage.stage - 1}", f"{stage.num_layers} layers"
        for key, label, style in (
            ("loss", f"{depth}, training", {"alpha": 0.35, "lw": 1}),
            ("eval_loss", depth, {"marker": ".", "lw": 2}),
        ):
            if points := [row for row in rows if key in row]:
                axes.plot(sent(points), [row[key] for row in points], color=color, label=label, **style)
    for name, curve in (baseline or {}).items():
        axes.plot(*megabytes_and_losses(curve), color="0.4", ls="--", marker=".", lw=1.5, label=f"{name}, full depth")
    if full := [row for row in log_history if "eval_full_loss" in row]:
        losses = [row["eval_full_loss"] for row in full]
        axes.plot(sent(full), losses, "k*", markersize=11, label="full depth")
    if axes.get_legend_handles_labels()[0]:  # a private run that evaluates nothing has no curve
        in_logarithms(axes)
        axes.legend(fontsize="small", ncols=2, loc="upper right")  # where falling losses are not
    return figure


def plot_curves(curves: Mapping[str, Sequence[Point]], loss: float) -> Figure:
    """Plot loss against megabytes sent, a line for each run, and the loss that they are compared at."""
    figure, axes = _against_megabytes("evaluation loss at full depth")
    for name, curve in curves.items():
        axes.plot(*megabytes_and_losses(curve), marker=".", lw=2, label=name)
    axes.axhline(loss, color="0.5", lw=1, ls="--", label=f"loss {loss:.3f}")
    in_logarithms(axes)
    axes.legend(fontsize="small", loc="upper right")
    return figure


def megabytes_and_losses(curve: Sequence[Point]) -> tuple[list[float], list[float]]:
    """The megabytes and the losses of a curve."""
    return [point.bytes / 1e6 for point in curve], [point.loss for point in curve]


def in_logarithms(axes: Axes) -> None:
    """Show losses in logarithms, as they fall fast at first: no part of the plot is empty."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _against_megabytes(what: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5))  # whose default margins fit: a layout engine would draw it twice
    axes = figure.add_subplot()
    axes.set(xlabel="MB sent (adapters, both ways)", ylabel=what)
    axes.grid(alpha=0.3)
    return figure, axes
