"""The curve of a run, and of runs side by side."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_devft.configuration import StageConfig
from hf_devft.federation.ledger import Ledger
from hf_devft.run.comparison import Point


def plot_run(log_history: list[dict], ledger: Ledger, stages: list[StageConfig]) -> Figure:
    """Plot loss against megabytes sent: each stage's submodel as a line, full depth at the stages' ends as points.

    Args:
        log_history: the Trainer's (`step` is the round).
        ledger: for the bytes sent until a round.
        stages: the finished stages.
    """
    figure, axes = _against_megabytes("loss")
    sent = lambda rows: [ledger.bytes_until(row["step"]) / 1e6 for row in rows]  # noqa: E731
    for stage in stages:
        rows = [row for row in log_history if row.get("stage") == stage.stage]
        for key, style in (("loss", {"alpha": 0.35, "lw": 1}), ("eval_loss", {"marker": ".", "lw": 2})):
            points = [row for row in rows if key in row]
            name = "training" if key == "loss" else "evaluation"
            label = f"stage {stage.stage}: {stage.num_layers} layers, {name}" if points else None
            axes.plot(sent(points), [row[key] for row in points], color=f"C{stage.stage - 1}", label=label, **style)
    if full := [row for row in log_history if "eval_full_loss" in row]:
        losses = [row["eval_full_loss"] for row in full]
        axes.plot(sent(full), losses, "k*", markersize=11, label="full depth, evaluation")
    if axes.get_legend_handles_labels()[0]:  # a private run that evaluates nothing has no curve
        axes.legend(fontsize="small")
    return figure


def plot_curves(curves: Mapping[str, Sequence[Point]], loss: float) -> Figure:
    """Plot loss against megabytes sent, a line for each run, and the loss that they are compared at."""
    figure, axes = _against_megabytes("evaluation loss at full depth")
    for name, curve in curves.items():
        axes.plot([point.megabytes for point in curve], [point.loss for point in curve], marker=".", lw=2, label=name)
    axes.axhline(loss, color="0.5", lw=1, ls="--", label=f"loss {loss:.3f}")
    axes.legend(fontsize="small")
    return figure


def _against_megabytes(what: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5))  # whose default margins fit: a layout engine would draw it twice
    axes = figure.add_subplot()
    axes.set(xlabel="MB sent (adapters, both ways)", ylabel=what)
    axes.grid(alpha=0.3)
    return figure, axes
