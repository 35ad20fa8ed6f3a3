"""What a checkpoint, or a finished stage's folder, holds beyond the Trainer's own state, so that a run goes on."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_devft.configuration import StageConfig
from hf_devft.configuration.devft_config import RENAMED
from hf_devft.configuration.stage_config import Count, Index
from hf_devft.configuration.stage_folder import FEDERATION, LEDGER, SUBMODEL
from hf_devft.federation.ledger import Ledger, RoundRecord
from hf_devft.files import FLOATS, read_json, read_record, read_tensors, write_json, write_tensors
from hf_devft.files.checksums import sha256
from hf_devft.models.adapter_files import load_adapter
from hf_devft.models.layout import State
from hf_devft.models.residual import without_residual


RUN_STATE = "devft_state.json"
SCHEDULE = "schedule.json"  # of a schedule that goes by a metric
_PLOTTED = ("loss", "grad_norm", "learning_rate", "epsilon")  # of the log, beside the losses of evaluations
_SHOWN = {"bytes", "flops", "seconds", "peak_memory"}  # in the table of stages
_SCHEDULE_0_1 = "scheduler.pt"  # pickled, and not read


def read_stages(folder: Path) -> list[StageConfig]:
    """Read the records of all stages of a run, as they stand in its folder, or in that of a checkpoint or a stage.

    Raises:
        OSError: there are none. ValueError: they are broken.
    """
    return read_record(folder / RUN_STATE, _RunFile).stages


def is_of_run(folder: Path, ledger: Ledger) -> bool:
    """Whether a folder is an earlier checkpoint of the run that has this ledger."""
    try:
        rounds = read_record(folder / LEDGER, list[RoundRecord])
    except (OSError, ValueError):
        return False
    return rounds == ledger.rounds[: len(rounds)]


def save_federation(folder: Path, state: State, is_private: bool) -> None:
    """Write what outlives a round, where there is anything.

    Args:
        is_private: whether nothing that can be pushed may tell of it, its size and checksum neither.
    """
    if state:
        write_tensors(folder / FEDERATION, state, listed=not is_private)


def load_federation(folder: str | Path) -> State:
    """Read what `save_federation` has written; nothing where it has not.

    Raises:
        ValueError: it is broken.
    """
    path = Path(folder) / FEDERATION
    return read_tensors(path, (*FLOATS, "I64", "I32"), largest=torch.finfo(torch.float32).max) if path.exists() else {}


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        stages: all stages, the finished ones with groups, metrics and totals, the running one with its groups.
        stage: the running stage, from 1; done: its rounds so far. In a finished stage's folder, the next stage and 0.
        stage_over: it was told to end (early stopping).
        within: whether it is within a stage, whose compact adapter it has, not between two.
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
    within: bool
    setting: dict[str, Any]
    ledger: Ledger
    federation: State
    start_metrics: dict[str, float] | None = None

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint, or into a finished stage's folder."""
        is_private = self.setting.get("differential privacy") is not None
        save_federation(folder, self.federation, is_private)
        remembers: bool | str = bool(self.federation)
        if remembers and not is_private:
            remembers = sha256(folder / FEDERATION)
        content = {
            "stages": [asdict(stage) for stage in self.stages],
            "stage": self.stage,
            "done": self.done,
            "stage_over": self.stage_over,
            "within": self.within,
            "setting": self.setting,
            "remembers": remembers,
            "start_metrics": self.start_metrics,
        }
        write_json(folder / RUN_STATE, content)
        write_json(folder / LEDGER, self.ledger.to_dicts())


@dataclass
class _RunFile:
    """`RunState` as it is in its file, which has no ledger, and of what is remembered the SHA-256 only.

    Version 0.1 looked up the metrics of the start in the log, and whether it was within a stage in the folder.
    """

    stages: list[StageConfig]
    stage: Count
    done: Index
    stage_over: bool
    setting: dict[str, Any]
    remembers: bool | str = False
    within: bool | None = None
    start_metrics: dict[str, Any] | None | Literal["in the log"] = "in the log"


@dataclass
class _TrainerFile:
    """What is read of the Trainer's own state."""

    global_step: Index
    max_steps: Index
    log_history: list[dict[str, Any]]
    epoch: float | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    train_batch_size: Count | None = None
    best_metric: float | None = None
    best_global_step: Index | None = None
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, Any] | None = None


@dataclass
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        folder: that it was read from.
        run: where the run stands.
        full: the full-depth adapter. base: name and revision of the base that it is of, where they are known.
        sub, schedule: the running stage's compact adapter and the schedule; None between two stages.
    """

    folder: Path
    run: RunState
    full: dict[str, torch.Tensor]
    base: tuple[str | None, str | None]
    sub: dict[str, torch.Tensor] | None
    schedule: dict | None

    @classmethod
    def load(cls, folder: str | Path, config: PeftConfig) -> "Checkpoint":
        """Read a `checkpoint-N` or a finished stage's folder.

        Args:
            config: of the adapter that is trained; one with a residual has a larger rank (see `product_adapter`).

        Raises:
            ValueError: it is neither, or not whole.
        """
        folder = Path(folder)
        try:
            trainer = _read_trainer_state(folder / TRAINER_STATE_NAME)
            found = read_record(folder / RUN_STATE, _RunFile)
            ledger = Ledger(read_record(folder / LEDGER, list[RoundRecord]))
            run = _run_state(found, trainer, ledger, _remembered(folder, found.remembers), folder)
            _check_agreement(run, trainer)
            schedule = read_json(folder / SCHEDULE) if run.within and (folder / SCHEDULE).exists() else None
            sub = without_residual(load_adapter(folder / SUBMODEL)[1], config) if run.within else None
            own, state = load_adapter(folder)
            full = without_residual(state, config)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} is not a checkpoint that a run can resume from: {error} Give a whole `checkpoint-N` "
                "folder that was saved without `save_only_model`, or a finished stage's."
            ) from error
        return cls(folder, run, full, (own.base_model_name_or_path, own.revision), sub, schedule)


def _read_trainer_state(path: Path) -> _TrainerFile:
    """Read the Trainer's own state, which it will read again."""
    content, known = read_json(path), {field.name for field in fields(TrainerState)}
    if isinstance(content, dict) and (unknown := sorted(content.keys() - known)):
        raise ValueError(f"{path} has {unknown[0][:80]!r}, which transformers does not know.")
    found = read_record(path, _TrainerFile)
    for row in found.log_history:
        counts = [row.get("step"), row.get("stage", 0), row.get("bytes", 0)]
        numbers = [value for name, value in row.items() if name in _PLOTTED or name.endswith("_loss")]
        if not all(type(count) is int for count in counts) or not all(type(n) in (int, float) for n in numbers):
            raise ValueError(f"{path} has a log whose rounds, bytes or losses are no numbers.")
    return found


def _remembered(folder: Path, remembers: bool | str) -> State:
    """Read what outlives a round, of a run that says whether there is any, and which."""
    path = folder / FEDERATION
    if not remembers:
        return {}
    if not path.exists():
        raise ValueError(f"{FEDERATION} is missing: what stays with the clients is never pushed, resume where it is.")
    state = load_federation(folder)
    if not state or (isinstance(remembers, str) and sha256(path) != remembers):
        raise ValueError(f"{path} is not the one that {RUN_STATE} beside it belongs to.")
    return state


def _run_state(found: _RunFile, trainer: _TrainerFile, ledger: Ledger, remembered: State, folder: Path) -> RunState:
    """Make a run's state of its files."""
    start: Any = found.start_metrics
    stages = found.stages
    if start == "in the log":
        start = next((row for row in trainer.log_history if row.get("stage") == 0), None)
        if found.done and found.stage <= len(stages):  # within a stage: what it would hand on
            stages[found.stage - 1].metrics = _handed_on(found.stage, trainer)
    return RunState(
        stages=stages,
        stage=found.stage,
        done=found.done,
        stage_over=found.stage_over,
        within=(folder / _SCHEDULE_0_1).exists() if found.within is None else found.within,
        setting={RENAMED.get(name, name): value for name, value in found.setting.items()},
        ledger=ledger,
        federation=remembered,
        start_metrics=start,
    )


def _handed_on(stage: int, trainer: _TrainerFile) -> dict[str, Any]:
    """The metrics of the round that a stage would hand on, from the log."""
    step = trainer.best_global_step or trainer.global_step
    rows = [row for row in trainer.log_history if row.get("step") == step and row.get("stage") == stage]
    return {key: value for row in rows for key, value in row.items() if key.startswith("eval_")}


def _check_agreement(run: RunState, trainer: _TrainerFile) -> None:
    """Refuse a run's files that say different things of where it stands."""
    count = len(run.stages)
    for number, record in enumerate(run.stages, start=1):
        record.check()
        if (record.stage, record.num_stages) != (number, count):
            raise ValueError(f"stage {number} of {count} calls itself {record.stage} of {record.num_stages}.")
    finished, rounds = run.stages[: run.stage - 1], run.ledger.rounds
    if run.stage > count + (not run.within) or (not run.within and (run.done or run.stage_over)):
        raise ValueError(f"it stands in round {run.done} of stage {run.stage} of {count}.")
    counted = [record.rounds_done for record in finished] + [run.done] * run.within
    if run.within and run.done > run.stages[run.stage - 1].rounds:
        raise ValueError(f"stage {run.stage} has {run.stages[run.stage - 1].rounds} rounds, and {run.done} are done.")
    if any(record.groups is None for record in [*finished, *run.stages[run.stage - 1 : run.stage] * run.within]):
        raise ValueError("a stage that was begun has no groups.")
    if any(not record.totals.keys() >= _SHOWN for record in finished):
        raise ValueError(f"a finished stage lacks one of the totals {', '.join(sorted(_SHOWN))}.")
    expected = [stage for stage, done in enumerate(counted, start=1) for _ in range(done)]
    if [record.stage for record in rounds] != expected or not _counts_up(record.round for record in rounds):
        raise ValueError(f"the ledger has {len(rounds)} rounds, {len(expected)} by stages were done: {counted}.")
    if trainer.global_step != len(rounds):
        raise ValueError(f"{TRAINER_STATE_NAME} counts {trainer.global_step} rounds, the ledger {len(rounds)}.")


def _counts_up(numbers: Iterable[int]) -> bool:
    return all(number == expected for expected, number in enumerate(numbers, start=1))
