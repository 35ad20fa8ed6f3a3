"""A run between two rounds: its stages, its adapters, its ledger; what is written of it, and read again."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from peft import PeftConfig

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.configuration.stage_folder import SUBMODEL
from hf_devft.embedded import portable_name
from hf_devft.federation.heterogeneity.capacity import Capacities
from hf_devft.federation.ledger import Ledger, RoundRecord
from hf_devft.federation.partition import ClientData
from hf_devft.federation.privacy import Accountant, affordable
from hf_devft.federation.rounds import Federation, RoundOutcome
from hf_devft.models.adapter_files import load_adapter, save_adapter
from hf_devft.models.layout import State
from hf_devft.models.residual import without_residual
from hf_devft.run.accounts import draws_of
from hf_devft.run.checkpoint import Checkpoint, RunState, load_federation
from hf_devft.run.comparison import Point
from hf_devft.run.healed_layers import HealedLayers
from hf_devft.run.report import StageResult
from hf_devft.run.setting import changed_stages, check_same_adapter, check_same_memory, check_same_setting, run_setting
from hf_devft.stages.global_adapter import GlobalAdapter
from hf_devft.trainer.active_stage import ActiveStage


logger = logging.getLogger(__name__)

# What the Trainer logs of the clients' rows.
_WITHOUT_NOISE = ("loss", "grad_norm", "train_loss", "num_input_tokens_seen", "total_flos")


def planned_draws(
    args: DevFTConfig, stages: list[StageConfig], capacities: Capacities, past: Sequence[RoundRecord] = ()
) -> list[Any]:
    """Say of each round that a run has, by its stages and `max_steps`, how its clients are drawn; see `draws_of`.

    Args:
        past: the rounds that are over.
    """
    numbers = [stage.stage for stage in stages for _ in range(stage.rounds)]
    numbers = numbers if args.max_steps < 0 else numbers[: args.max_steps]
    return _draws(args, past, numbers[len(past) :], capacities)


def _draws(args: DevFTConfig, past: Sequence[RoundRecord], coming: list[int], capacities: Capacities) -> list[Any]:
    """`draws_of` rounds that are over, which were drawn as they were, whatever clients can hold today; and of coming
    ones of these stages."""
    numbers = [*(record.stage for record in past), *coming]
    able = {number: list(capacities.taking_part(number)) for number in set(numbers)}
    draws = draws_of(args, ((index, able[number]) for index, number in enumerate(numbers)))
    known = [record.drawn_from for record in past]
    return [draw if one is None else one for draw, one in zip_longest(draws, known)]


def _named(base: str | None, revision: str | None) -> str:
    """A base as one names it; empty where it has no name."""
    return portable_name(base or "") + (f" at {revision}" if base and revision else "")


@dataclass
class FederatedRun:
    """The state of a run.

    Attributes:
        args: its config.
        clients: who has which rows.
        stages: the records of all stages; those that are finished have groups, metrics and totals.
        adapter: the full-depth adapter, as it was when the running stage began.
        healed: keeps the layers that were healed.
        capacities: which stage's submodel each client trains.
        ledger: what the rounds so far have cost.
        federation: runs the rounds; None before the first `train`.
        active: the stage that is being trained, or None.
        start_metrics: of the full model before the first round, where it was evaluated.
        client_losses: of the last round's clients, by name; none in a run that is differentially private.
        baseline: {name: how its loss fell} of another run, for the plot.
        accountant: of the privacy that rounds cost, in a run that is differentially private; else None.
    """

    args: DevFTConfig
    clients: ClientData
    stages: list[StageConfig]
    adapter: GlobalAdapter
    healed: HealedLayers
    capacities: Capacities
    ledger: Ledger = field(default_factory=Ledger)
    federation: Federation | None = None
    active: ActiveStage | None = None
    start_metrics: dict[str, float] | None = None
    accountant: Accountant | None = None
    client_losses: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, list[Point]] = field(default_factory=dict)

    @property
    def residual(self) -> State:
        """What the method adds to the weights beside the adapter, at the depth where it stands."""
        return {} if self.federation is None else self.federation.method.residual()

    @property
    def num_rounds(self) -> int:
        """Of all stages, or fewer where `max_steps` or the privacy budget says so."""
        if self.accountant is not None and self.args.dp_target_epsilon is not None:
            draws = planned_draws(self.args, self.stages, self.capacities, self.ledger.rounds)
            return affordable(self.accountant, draws, self.args.dp_target_epsilon)
        return len(planned_draws(self.args, self.stages, self.capacities))

    def annotated(self, logs: dict[str, float]) -> dict[str, float]:
        """Add to what is logged within a stage where the run stands; in a private run, take out what no noise
        covers."""
        if self.active is not None:
            logs = logs | {"stage": self.active.record.stage, "bytes": self.ledger.bytes}
        if self.accountant is None:
            return logs
        spent = {"epsilon": epsilon} if (epsilon := self.ledger.totals().get("epsilon")) is not None else {}
        return {name: value for name, value in logs.items() if name not in _WITHOUT_NOISE} | spent

    def record_round(self, outcome: RoundOutcome, index: int, seconds: float, peak_memory: int) -> None:
        """Add a round of the active stage to the ledger.

        Args:
            index: of the round, from 0. seconds, peak_memory: what it took.
        """
        assert self.active is not None
        of_the_round = {
            "round_index": index, "stage": self.active.record.stage, "names": self.clients.names, "seconds": seconds,
            "peak_memory": peak_memory,
        }  # fmt: skip
        if self.accountant is None:
            self.ledger.add(outcome.to_record(**of_the_round))
            secret = self.args.secure_aggregation  # then the server has only sums; each one's loss is nobody's matter
            self.client_losses = (
                {} if secret else {self.clients.names[client]: loss for client, loss in outcome.losses.items()}
            )
            return
        draws = _draws(self.args, self.ledger.rounds, [self.active.record.stage], self.capacities)
        outcome.seen = 0
        if self.args.protects_clients and self.federation is not None:
            outcome.bytes_down, outcome.bytes_up = self.federation.expected_bytes(self.args.clients_per_round)
        drawn_from = draws[-1] if self.args.protects_clients else None
        self.ledger.add(outcome.to_private_record(self.accountant.epsilon(draws), drawn_from, **of_the_round))

    # --- a stage is over ------------------------------------------------------------------------------------

    def hand_on(self, best: Path | None) -> tuple[PeftConfig, State]:
        """End the active stage: its adapter, and what is remembered, are at full depth from here on.

        Args:
            best: the checkpoint whose round the stage hands on; None for the last round.

        Returns:
            The submodel's adapter as plain PEFT has it.
        """
        active, federation = self.active, self.federation
        assert active is not None
        assert federation is not None
        sub = active.state
        if best is not None:
            sub = without_residual(load_adapter(best / SUBMODEL)[1], self.adapter.config)
            federation.memory.load_state_dict(load_federation(best))
        compact = active.to_peft(sub, self.residual)
        self.adapter = active.expand(sub)
        federation.end_stage(active.expand_partial_state)
        self.active = None
        active.record.rounds_done = active.done
        active.record.totals = self.ledger.totals(active.record.stage) | active.setup
        return compact

    def result(self, record: StageConfig, compact: tuple[PeftConfig, State]) -> StageResult:
        """Put together what a stage that was handed on came to."""
        return StageResult(record, self.adapter.to_peft(self.residual), compact)

    # --- files ----------------------------------------------------------------------------------------------

    def save_adapters(self, folder: Path, state: State | None = None) -> None:
        """Write the full-depth adapter, and within a stage also the submodel's, with the healed layers it is for.

        Args:
            state: the full-depth adapter's, where the model in use has it; default: as the run stands.
        """
        if (active := self.active) is not None:
            full = active.expand(active.state)
            save_adapter(folder, *full.to_peft(active.expand_partial_state(self.residual)))
            save_adapter(folder / SUBMODEL, *active.to_peft(active.state, self.residual))
            self.healed.copy_into(folder / SUBMODEL, active.record.stage)
        elif state is not None:
            save_adapter(folder, *replace(self.adapter, state=state).to_peft({}))
        else:
            save_adapter(folder, *self.adapter.to_peft(self.residual))

    def save_state(self, folder: Path, stage: int, done: int | None, is_over: bool) -> None:
        """Write what the run needs to go on with the round after `done` of `stage`, but for adapters and schedule.

        Args:
            done: None before the stage, whose submodel is not made yet. is_over: whether the stage was told to end.
        """
        RunState(
            stages=self.stages,
            stage=stage,
            done=done or 0,
            stage_over=is_over,
            within=done is not None,
            setting=self._setting(),
            ledger=self.ledger,
            federation={} if self.federation is None else self.federation.state_dict(),
            start_metrics=self.start_metrics,
        ).save(folder)

    def load(self, folder: str) -> Checkpoint:
        """Read a checkpoint, or a finished stage's folder; copies what it knows of the stages into `stages`.

        Raises:
            ValueError: it is neither, of another run, or of one that is over.
        """
        checkpoint = Checkpoint.load(folder, self.adapter.config)
        check_same_setting(checkpoint.run.setting, self._setting(), folder)
        check_same_adapter(checkpoint.full, self.adapter.state, f" in {folder}")
        if checkpoint.run.stage > len(self.stages):
            raise ValueError(
                f"{folder} is the last stage's: nothing is left to do. To train further, start a new run from its "
                "adapter."
            )
        own = self.adapter.config
        before, now = _named(*checkpoint.base), _named(own.base_model_name_or_path, own.revision)
        if before and before != now and self.args.process_index == 0:
            logger.warning(
                f"the run in {folder} was begun on {before}, and goes on on {now or 'the given model'}: what it has "
                "learned is of use only where these are the same weights."
            )
        self._check_account(checkpoint.run.ledger.rounds, folder)
        names = set(self.clients.names)
        if strangers := {each for row in checkpoint.run.ledger.rounds for each in row.clients} - names:
            raise ValueError(
                f"{folder} is of a run with other clients: {sorted(strangers)[0]!r} is none of this one's."
            )
        check_same_memory(checkpoint.run.federation, len(names), checkpoint.sub or checkpoint.full, folder)
        begun = slice(checkpoint.run.stage - 1, None)
        changed = changed_stages(checkpoint.run.stages[begun], self.stages[begun])
        if changed and self.args.process_index == 0:
            logger.warning(f"the run in {folder} goes on with other options than it was begun with: {changed}.")
        for stage, old in zip(self.stages, checkpoint.run.stages, strict=True):
            planned = ("rounds", "learning_rate") if stage.stage < checkpoint.run.stage else ()
            for name in ("groups", "metrics", "totals", "rounds_done", *planned):
                setattr(stage, name, getattr(old, name))
        if begun.start < len(self.stages) and checkpoint.run.done > (asked := self.stages[begun.start].rounds):
            raise ValueError(
                f"{folder} has {checkpoint.run.done} rounds of stage {checkpoint.run.stage}, stage_rounds asks for "
                f"{asked}: ask for as many, or resume from an earlier checkpoint."
            )
        return checkpoint

    def _check_account(self, rounds: Sequence[RoundRecord], folder: str) -> None:
        """Refuse past rounds that cost another ε by today's rows than was recorded."""
        if self.accountant is None or not rounds:
            return
        recorded, now = rounds[-1].epsilon, self.accountant.epsilon(_draws(self.args, rounds, [], self.capacities))
        if recorded is None or not math.isclose(recorded, now, rel_tol=1e-3):
            raise ValueError(
                f"the rounds in {folder} are recorded to have cost ε = {recorded}, but {now:.4g} by the rows and "
                "clients that are given now: resume with the same, or start anew."
            )

    def check_start(self, checkpoint: Checkpoint | None) -> None:
        """Refuse to begin anew on a base that the method has changed, or on what private rounds have learned.

        Raises:
            ValueError: it has, and there is no checkpoint to go on from.
        """
        if checkpoint is None and self.accountant is not None and self.ledger.rounds:
            raise ValueError(
                "another `train` would go on from an adapter whose private rounds it does not account for: resume "
                "from a checkpoint, or start a new trainer."
            )
        if checkpoint is None and self.residual:
            raise ValueError(
                f"federated_method={self.args.federated_method!r} has changed the base beside the adapter, and "
                "another `train` would begin without that: resume from a checkpoint, or start a new trainer from the "
                "adapter in `output_dir`, merged into the base."
            )

    def begin(self, adapter: State, checkpoint: Checkpoint | None) -> None:
        """Reset the state to the start, with this full-depth adapter, or to where a checkpoint has left it.

        Raises:
            ValueError: the adapter is another one, or healed layers that are needed are not in its folder.
        """
        self.federation = self.active = None
        if checkpoint is None:
            check_same_adapter(adapter, self.adapter.state)
            self.ledger, self.start_metrics = Ledger(), None
            self.adapter = replace(self.adapter, state=adapter)
            return
        within = checkpoint.sub is not None
        if within or self.args.distillation_steps or self.args.client_max_layers:
            self.healed.take_from(checkpoint.folder, checkpoint.run.stage - (not within))
        self.ledger, self.start_metrics = checkpoint.run.ledger, checkpoint.run.start_metrics
        self.adapter = replace(self.adapter, state=checkpoint.full)

    def _setting(self) -> dict[str, Any]:
        noise = None if self.accountant is None else self.accountant.noise_multiplier
        return run_setting(self.args, self.stages, self.adapter.config, self.clients, noise)
