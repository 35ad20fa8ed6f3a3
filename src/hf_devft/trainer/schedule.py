"""The learning rate: a schedule over rounds, a rate per stage."""

import inspect
from typing import Any

import torch
from transformers.optimization import GreedyLR

from hf_devft.trainer.interface import FederatedTrainer


_RATE, _SCHEDULER = "rate", "scheduler"


class RoundSchedule:
    """`trainer`'s learning rate schedule, stepped once a round.

    It runs on an optimiser of its own that has nothing to optimise, as those of the stages come and go. One that goes
    by a metric begins anew with each stage (our choice: the metrics of two submodels cannot be compared), and a
    warm-up without its first step, whose rate is zero (our choice: clients would train and send for nothing).

    Args:
        num_rounds: of the whole run.
        done: rounds that are over already, which it is run through.
        state: a `state_dict` of then; without it, one that goes by a metric starts anew.

    Raises:
        ValueError: a state of another schedule.
    """

    def __init__(self, trainer: FederatedTrainer, num_rounds: int, done: int = 0, state: dict | None = None):
        self.base_rate = trainer.args.learning_rate
        self._trainer, self._num_rounds = trainer, num_rounds
        self._begin()
        self._goes_by_a_metric = isinstance(self.scheduler, (torch.optim.lr_scheduler.ReduceLROnPlateau, GreedyLR))
        for _ in range(done):
            self.step()
        if state is not None and self._goes_by_a_metric:
            self._load(state)

    def _begin(self) -> None:
        self._make(self._num_rounds)
        if self.clock.param_groups[0]["lr"] == 0:  # of a warm-up, whose first step is none
            self._make(self._num_rounds + 1)
            self.clock.step()
            self.scheduler.step()

    def _make(self, num_rounds: int) -> None:
        trainer = self._trainer
        self.clock = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.base_rate)
        # An own one may read the trainer's optimiser, which `Trainer` does not hand it, and only set the schedule.
        before, trainer.optimizer, trainer.lr_scheduler = trainer.optimizer, self.clock, None
        takes = inspect.signature(trainer.create_scheduler).parameters
        given = {"optimizer": self.clock} if "optimizer" in takes else {}
        made = trainer.create_scheduler(num_training_steps=num_rounds, **given)
        self.scheduler = trainer.lr_scheduler if made is None else made
        trainer.optimizer = before

    def begin_stage(self) -> None:
        """Begin a schedule that goes by a metric anew."""
        if self._goes_by_a_metric:
            self._begin()

    def state_dict(self) -> dict[str, Any] | None:
        """Return what does not follow from the rounds, as JSON has it; None where all does."""
        if not self._goes_by_a_metric:
            return None
        return {_RATE: self.clock.param_groups[0]["lr"], _SCHEDULER: self.scheduler.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        own = self.state_dict()
        if not _is_like(state, own) or not 0 < state[_RATE] < float("inf"):
            raise ValueError(
                "the checkpoint's schedule is not one of this run's lr_scheduler_type: resume with the same, from a "
                "checkpoint that is whole."
            )
        self.scheduler.load_state_dict(state[_SCHEDULER])
        self.clock.param_groups[0]["lr"] = state[_RATE]

    def step(self) -> None:
        """Step after a round. Schedules that go by a metric are stepped by the Trainer's evaluation instead."""
        self.clock.step()
        if not self._goes_by_a_metric:
            self.scheduler.step()

    def rate(self, stage_rate: float) -> float:
        """Return a stage's rate times the schedule's factor."""
        return stage_rate * self.clock.param_groups[0]["lr"] / self.base_rate


def _is_like(state: Any, own: Any) -> bool:
    """Whether a state has the keys of another one, with values of the same kinds; lists of numbers have any length."""
    if isinstance(own, dict):
        return (
            isinstance(state, dict)
            and state.keys() == own.keys()
            and all(_is_like(state[key], own[key]) for key in own)
        )
    if isinstance(own, list):
        return isinstance(state, list) and all(_is_like(value, 0.0) for value in state)
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(state, (int, float)) and not isinstance(state, bool)
    return type(state) is type(own)
