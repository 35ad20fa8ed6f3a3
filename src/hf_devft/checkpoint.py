"""What a checkpoint, or a finished stage's folder, holds beyond the Trainer's own state, so that a run goes on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from hf_devft.configuration import StageConfig
from hf_devft.federation.ledger import Ledger
from hf_devft.hub.artifacts import LEDGER, SUBMODEL, load_adapter


RUN_STATE = "devft_state.json"
SCHEDULE = "scheduler.pt"

# What reading a file raises that is not there, not whole, or something else.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, UnpicklingError)


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        stages: all stages, the finished ones with groups, metrics and totals, the running one with its groups.
        stage: the running stage, from 1; done: its rounds so far. In a finished stage's folder, the next stage and 0.
        stage_over: it was told to end (early stopping).
        setting: what a resumed run must have in common, {name: value}.
        ledger: all rounds so far.
    """

    stages: list[StageConfig]
    stage: int
    done: int
    stage_over: bool
    setting: dict[str, Any]
    ledger: Ledger

    def save(self, folder: Path) -> None:
        content = {
            "stages": [asdict(stage) for stage in self.stages],
            "stage": self.stage,
            "done": self.done,
            "stage_over": self.stage_over,
            "setting": self.setting,
        }
        (folder / RUN_STATE).write_text(json.dumps(content))
        (folder / LEDGER).write_text(json.dumps(self.ledger.to_dicts()))


@dataclass
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        run: where the run stands.
        full: the full-depth adapter.
        sub, schedule: the running stage's compact adapter and the schedule; None between two stages.
    """

    run: RunState
    full: dict[str, torch.Tensor]
    sub: dict[str, torch.Tensor] | None
    schedule: dict | None

    @classmethod
    def load(cls, folder: str | Path) -> "Checkpoint":
        """Read a `checkpoint-N` or a finished stage's folder.

        Raises:
            ValueError: it is neither, or not whole.
        """
        folder = Path(folder)
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())  # the Trainer's own part
            content = json.loads((folder / RUN_STATE).read_text())
            stages = [StageConfig(**stage) for stage in content.pop("stages")]
            ledger = Ledger.from_dicts(json.loads((folder / LEDGER).read_text()))
            run = RunState(stages=stages, ledger=ledger, **content)
            if not 1 <= run.stage <= len(stages) + 1 or not isinstance(run.setting, dict):
                raise ValueError(f"there is no stage {run.stage} of {len(stages)}")
            between = run.done == 0 and not (folder / SCHEDULE).exists()
            schedule = None if between else torch.load(folder / SCHEDULE, weights_only=True)
        except _BROKEN as error:
            raise ValueError(
                f"{folder} is not a checkpoint that a run can resume from: {error}. Give a whole `checkpoint-N` "
                "folder that was saved without `save_only_model`, or a finished stage's."
            ) from error
        sub = None if between else load_adapter(folder / SUBMODEL)[1]
        return cls(run, load_adapter(folder)[1], sub, schedule)
