"""One communication round: sampled clients train from the global adapter, and what they return is combined."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from hf_devft.federation.batches import ClientBatches
from hf_devft.federation.client import LocalResult
from hf_devft.federation.methods import FederatedMethod
from hf_devft.federation.sampling import ClientSampling, Placement


logger = logging.getLogger(__name__)

# What processes tell each other of a client, one row of numbers each.
COLUMNS = SENT, COUNTED, LOSS, GRAD_NORM, TOKENS, SEEN = range(6)


class QuorumError(RuntimeError):
    """Too few clients of a round returned a finite adapter, however often it was tried."""


@dataclass
class RoundOutcome:
    """What a round came to, over all its attempts.

    Attributes:
        adapter: the new global adapter, flat.
        loss: mean training loss of the clients that counted.
        grad_norm: of the last client that counted.
        sampled: all clients that were sent the adapter; left_out: those of them whose update was left out.
        sent: how many sent one back.
        tokens, seen: see `LocalResult`; sums.
        attempts: how often the round was tried.
    """

    adapter: torch.Tensor | None = None
    loss: float = 0.0
    grad_norm: float = 0.0
    sampled: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    sent: int = 0
    tokens: int = 0
    seen: int = 0
    attempts: int = 0

    def add(self, sampled: list[int], reports: torch.Tensor) -> int:
        """Take an attempt in; returns how many of its clients counted."""
        counted = reports[:, COUNTED] > 0
        self.attempts += 1
        self.sampled += sampled
        self.left_out += [client for client, counts in zip(sampled, counted.tolist(), strict=True) if not counts]
        self.sent += int(reports[:, SENT].sum())
        self.tokens += int(reports[:, TOKENS].sum())
        self.seen += int(reports[:, SEEN].sum())
        if counted.any():
            self.loss = reports[counted, LOSS].mean().item()
            self.grad_norm = reports[counted, GRAD_NORM][-1].item()
        return int(counted.sum())


@dataclass
class Federation:
    """Runs rounds, on one process or on several that each call it alike.

    Attributes:
        method: combines the adapters.
        sampling: chooses the clients.
        placement: this process's share of the work.
        names: the clients' names; examples: how many rows each has.
        quorum: how many clients of a round must return a finite adapter.
        retries: how often a round below its quorum is tried again with other clients.
        batches_of: (rounds, attempt) -> the batches of this process's clients in them.
        rounds: all rounds to come.
        add_up: sums a tensor over the processes, in place.
        device: where those sums are made.
    """

    method: FederatedMethod
    sampling: ClientSampling
    placement: Placement
    names: list[str]
    examples: list[int]
    quorum: int
    retries: int
    batches_of: Callable[[Iterable[int], int], ClientBatches]
    rounds: range
    add_up: Callable[[torch.Tensor], None]
    device: torch.device

    def __post_init__(self):
        self._batches = self.batches_of(self.rounds, 0)
        self._first_error: Exception | None = None

    def run(
        self,
        round_index: int,
        start: torch.Tensor,
        train_client: Callable[[int, ClientBatches], tuple[LocalResult, torch.Tensor]],
    ) -> RoundOutcome:
        """One round from the global adapter `start`.

        Args:
            train_client: (client, its batches) -> its result and its adapter, which may be reused afterwards.

        Raises:
            QuorumError: see there; caused by the first client's error, where one raised on this process.
        """
        outcome, self._first_error = RoundOutcome(), None
        for attempt in range(self.retries + 1):
            sampled = self.sampling.sampled(round_index, attempt)
            batches = self._batches if attempt == 0 else self.batches_of([round_index], attempt)
            self.method.begin_round(start)
            reports = torch.zeros(len(sampled), len(COLUMNS), dtype=torch.float64)
            for client in self.placement.clients(self.sampling.training(round_index, attempt)):
                reports[sampled.index(client)] = self._train(round_index, client, batches.next_client(), train_client)
            counted = outcome.add(sampled, self._of_all_processes(reports))
            if counted >= self.quorum:
                if not self.placement.shares_batches:
                    self.method.merge(self.add_up)
                outcome.adapter = self.method.end_round()
                return outcome
            logger.warning(
                f"round {round_index + 1}, attempt {attempt + 1}: {counted} of {len(sampled)} clients returned a "
                f"finite adapter, {self.quorum} are needed."
            )
        raise QuorumError(
            f"round {round_index + 1}: fewer than round_quorum={self.quorum} clients returned a finite adapter in "
            f"{self.retries + 1} attempts. Mend the clients, or lower `learning_rate`, `max_grad_norm` or "
            "`round_quorum`; then go on from the last checkpoint with `resume_from_checkpoint`."
        ) from self._first_error

    def _train(self, round_index: int, client: int, batches: ClientBatches, train_client: Callable) -> torch.Tensor:
        """A client's report; its adapter goes to the method, unless it fails."""
        report = torch.zeros(len(COLUMNS), dtype=torch.float64)
        try:
            result, adapter = train_client(client, batches)
        except Exception as error:
            if not self.placement.outlives_errors:
                raise
            self._first_error = self._first_error or error
            self._warn(round_index, client, f"failed and was left out: {type(error).__name__}: {error}")
            return report
        report[SENT], report[TOKENS], report[SEEN] = 1, result.tokens, result.seen
        if not torch.isfinite(adapter).all():
            self._warn(round_index, client, "returned an adapter that is not finite and was left out.")
            return report
        self.method.receive(adapter, self.examples[client])
        report[COUNTED], report[LOSS] = 1, float(result.loss)
        report[GRAD_NORM] = float("nan") if result.grad_norm is None else float(result.grad_norm)
        return report

    def _of_all_processes(self, reports: torch.Tensor) -> torch.Tensor:
        """Each client's report, from the process or the processes that trained it."""
        if self.placement.count == 1:
            return reports
        reports = reports.to(self.device)
        self.add_up(reports)
        if self.placement.shares_batches:  # all know the client, each counted its own tokens
            reports[:, : GRAD_NORM + 1] /= self.placement.count
        return reports.cpu()

    def _warn(self, round_index: int, client: int, what: str) -> None:
        logger.warning(f"round {round_index + 1}: client {self.names[client]} {what}")
