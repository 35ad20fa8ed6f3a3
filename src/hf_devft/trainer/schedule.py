"""The learning rate: a schedule over rounds, a rate per stage."""

import torch
from transformers.optimization import GreedyLR

from hf_devft.trainer.interface import FederatedTrainer


class RoundSchedule:
    """`trainer`'s learning rate schedule, stepped once a round.

    It runs on an optimiser of its own that has nothing to optimise, as those of the stages come and go.

    Args:
        num_rounds: of the whole run.
        done: rounds that are over already.
        state: a `state_dict` of then; without it, the schedule is run through them. (One that goes by a metric starts
            anew.)
    """

    def __init__(self, trainer: FederatedTrainer, num_rounds: int, done: int = 0, state: dict | None = None):
        self.base_rate = trainer.args.learning_rate
        self.clock = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.base_rate)
        trainer.lr_scheduler = None
        self.scheduler = trainer.create_scheduler(num_rounds, optimizer=self.clock)
        if state is None:
            for _ in range(done):
                self.step()
        else:
            self.scheduler.load_state_dict(state["scheduler"])
            self.clock.load_state_dict(state["clock"])

    def state_dict(self) -> dict:
        return {"scheduler": self.scheduler.state_dict(), "clock": self.clock.state_dict()}

    def step(self) -> None:
        """Step after a round. Schedules that go by a metric are stepped by the Trainer's evaluation instead."""
        self.clock.step()
        if not isinstance(self.scheduler, (torch.optim.lr_scheduler.ReduceLROnPlateau, GreedyLR)):
            self.scheduler.step()

    def rate(self, stage_rate: float) -> float:
        """Return a stage's rate times the schedule's factor."""
        return stage_rate * self.clock.param_groups[0]["lr"] / self.base_rate
