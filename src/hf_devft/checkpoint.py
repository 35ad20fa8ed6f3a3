"""What a checkpoint holds beyond the Trainer's own state, so that a run goes on mid-stage."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from hf_devft.configuration import StageConfig
from hf_devft.federation.ledger import Ledger
from hf_devft.hub.artifacts import SUBMODEL, load_adapter


RUN_STATE = "devft_state.json"
SCHEDULE = "scheduler.pt"


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        stages: all stages, the finished ones with groups, metrics and totals, the running one with its groups.
        stage: the running stage, from 1; done: its rounds so far.
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
            "ledger": self.ledger.to_dicts(),
        }
        (folder / RUN_STATE).write_text(json.dumps(content))


@dataclass
class Checkpoint:
    """A checkpoint read back: the run's state, the full-depth and the compact adapter, the schedule."""

    run: RunState
    full: dict[str, torch.Tensor]
    sub: dict[str, torch.Tensor]
    schedule: dict

    @classmethod
    def load(cls, folder: str | Path) -> "Checkpoint":
        """Raises ValueError where the folder is not a whole checkpoint of a federated run."""
        folder = Path(folder)
        try:
            content = json.loads((folder / RUN_STATE).read_text())
            stages = [StageConfig(**stage) for stage in content.pop("stages")]
            ledger = Ledger.from_dicts(content.pop("ledger"))
            run = RunState(stages=stages, ledger=ledger, **content)
            schedule = torch.load(folder / SCHEDULE, weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
            raise ValueError(
                f"{folder} is not a checkpoint that a run can resume from: {error}. Give a whole `checkpoint-N` "
                "folder that was saved without `save_only_model`."
            ) from error
        return cls(run, load_adapter(folder)[1], load_adapter(folder / SUBMODEL)[1], schedule)
