"""Runs side by side: what each took until a loss that all of them reached."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_devft.configuration import StageConfig
from hf_devft.configuration.stage_folder import LEDGER, STAGE_CONFIG_NAME
from hf_devft.federation.ledger import Ledger, RoundRecord
from hf_devft.files.reading import read_record
from hf_devft.run.checkpoint import read_stages


@dataclass(frozen=True)
class Point:
    """The full model's evaluation after a round.

    Attributes:
        loss: of the evaluation rows.
        rounds, bytes, flops, seconds: until then; FLOPs are the clients', seconds also the server's, which has set
            stages up.
        server_flops: of teaching, on the server.
    """

    loss: float
    rounds: int
    bytes: int
    flops: float
    seconds: float
    server_flops: float = 0.0


def read_curve(folder: str | Path) -> list[Point]:
    """Read how a run's loss at full depth fell, from its output folder or that of a stage.

    Raises:
        ValueError: it is no folder, there is no finished stage, or nothing was evaluated.
    """
    folder = Path(folder)
    if not folder.is_dir():  # nor is it asked for on the Hub
        raise ValueError(f"{folder} is no folder: give the output folder of a run.")
    if not (folder / STAGE_CONFIG_NAME).exists():
        raise ValueError(f"{folder} has no finished stage: give the output folder of a run that has one.")
    last, stages = StageConfig.from_pretrained(folder), read_stages(folder)
    ledger = Ledger(read_record(folder / LEDGER, list[RoundRecord]))
    history = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).log_history
    losses: dict[int, float | None] = {}
    for row in history:
        # A submodel's own loss is another model's.
        is_whole = row["step"] == 0 or stages[row.get("stage", 1) - 1].num_layers == last.full_layers
        if "eval_full_loss" in row or ("eval_loss" in row and is_whole):
            losses[row["step"]] = row.get("eval_full_loss", row.get("eval_loss"))
    found = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not found:
        said = "finite evaluation at full depth: its loss is NaN" if losses else (
            "evaluation at full depth: train with `eval_strategy` and evaluation rows"
        )  # fmt: skip
        raise ValueError(f"{folder} has no {said}.")
    return [_point(loss, ledger, step, stages) for step, loss in sorted(found.items())]


def _point(loss: float, ledger: Ledger, step: int, stages: Sequence[StageConfig]) -> Point:
    rounds = ledger.rounds[:step]
    begun = stages[: rounds[-1].stage] if rounds else []
    setup = {of: sum(stage.totals.get(f"setup_{of}", 0.0) for stage in begun) for of in ("seconds", "flops")}
    return Point(
        loss=loss,
        rounds=step,
        bytes=ledger.bytes_until(step),
        flops=sum(record.flops for record in rounds),
        seconds=sum(record.seconds for record in rounds) + setup["seconds"],
        server_flops=setup["flops"],
    )


def common_loss(curves: Sequence[Sequence[Point]]) -> float:
    """Return the lowest loss that every run has reached."""
    return max(min(point.loss for point in curve) for curve in curves)


def reached(curve: Sequence[Point], loss: float) -> Point:
    """Return the first point of a curve at or below a loss that it reaches."""
    return next(point for point in curve if point.loss <= loss)
