"""What a checkpoint, or a finished stage's folder, holds beyond the Trainer's own state, so that a run goes on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from hf_devft.configuration import StageConfig
from hf_devft.configuration.devft_config import RENAMED
from hf_devft.configuration.stage_folder import FEDERATION, LEDGER, SUBMODEL
from hf_devft.federation.ledger import Ledger
from hf_devft.models.adapter_files import load_adapter
from hf_devft.models.layout import State
from hf_devft.models.residual import without_residual


RUN_STATE = "devft_state.json"
SCHEDULE = "scheduler.pt"

# What reading a file raises that is not there, not whole, or something else.
_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    SafetensorError,
)


def save_federation(folder: Path, state: State) -> None:
    """Write what outlives a round, where there is anything."""
    if state:
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        save_file(tensors, folder / FEDERATION)


def load_federation(folder: str | Path) -> State:
    """Read what `save_federation` has written; nothing where it has not."""
    path = Path(folder) / FEDERATION
    return load_file(path) if path.exists() else {}


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        stages: all stages, the finished ones with groups, metrics and totals, the running one with its groups.
        stage: the running stage, from 1; done: its rounds so far. In a finished stage's folder, the next stage and 0.
        stage_over: it was told to end (early stopping).
        setting: what a resumed run must have in common, {name: value}.
        ledger: all rounds so far.
        federation: what outlives a round, of the server and of the clients; in a file of its own, which is never
            pushed.
        start_metrics: of the full model before the first round, where it was evaluated.
    """

    stages: list[StageConfig]
    stage: int
    done: int
    stage_over: bool
    setting: dict[str, Any]
    ledger: Ledger
    federation: State
    start_metrics: dict[str, float] | None = None

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint, or into a finished stage's folder."""
        content = {
            "stages": [asdict(stage) for stage in self.stages],
            "stage": self.stage,
            "done": self.done,
            "stage_over": self.stage_over,
            "setting": self.setting,
            "remembers": bool(self.federation),
            "start_metrics": self.start_metrics,
        }
        (folder / RUN_STATE).write_text(json.dumps(content))
        (folder / LEDGER).write_text(json.dumps(self.ledger.to_dicts()))
        save_federation(folder, self.federation)


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
    def load(cls, folder: str | Path, rank: int) -> "Checkpoint":
        """Read a `checkpoint-N` or a finished stage's folder.

        Args:
            rank: of the adapter that is trained; one with a residual has more (see `product_adapter`).

        Raises:
            ValueError: it is neither, or not whole.
        """
        folder = Path(folder)
        try:
            trainer_state = json.loads((folder / TRAINER_STATE_NAME).read_text())
            content = _current(json.loads((folder / RUN_STATE).read_text()), trainer_state)
            stages = [StageConfig(**stage) for stage in content.pop("stages")]
            ledger = Ledger.from_dicts(json.loads((folder / LEDGER).read_text()))
            remembers = content.pop("remembers", False)
            if remembers and not (folder / FEDERATION).exists():
                raise ValueError(
                    f"{FEDERATION} is missing: what stays with the clients is never pushed, resume where it is"
                )
            run = RunState(stages=stages, ledger=ledger, federation=load_federation(folder), **content)
            if not 1 <= run.stage <= len(stages) + 1 or not isinstance(run.setting, dict):
                raise ValueError(f"it stands in stage {run.stage} of {len(stages)}")
            between = run.done == 0 and not (folder / SCHEDULE).exists()
            schedule = None if between else torch.load(folder / SCHEDULE, weights_only=True)
        except _BROKEN as error:
            raise ValueError(
                f"{folder} is not a checkpoint that a run can resume from: {error}. Give a whole `checkpoint-N` "
                "folder that was saved without `save_only_model`, or a finished stage's."
            ) from error
        sub = None if between else without_residual(load_adapter(folder / SUBMODEL)[1], rank)
        return cls(run, without_residual(load_adapter(folder)[1], rank), sub, schedule)


def _current(content: dict[str, Any], trainer_state: dict[str, Any]) -> dict[str, Any]:
    """A run state as it is written today, of one by version 0.1, which looked metrics up in the log."""
    content["setting"] = {RENAMED.get(name, name): value for name, value in content["setting"].items()}
    if "start_metrics" in content:
        return content
    log = trainer_state["log_history"]
    content["start_metrics"] = next((row for row in log if row.get("stage") == 0), None)
    if content["done"]:  # within a stage: what it would hand on
        handed_on = trainer_state.get("best_global_step") or trainer_state["global_step"]
        rows = [row for row in log if row["step"] == handed_on and row.get("stage") == content["stage"]]
        metrics = {key: value for row in rows for key, value in row.items() if key.startswith("eval_")}
        content["stages"][content["stage"] - 1]["metrics"] = metrics
    return content
