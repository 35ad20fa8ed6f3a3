"""One communication round: sampled clients train from what they receive, and what they send is combined."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hf_devft.federation.batches import ClientBatches
from hf_devft.federation.heterogeneity.clock import SimulatedClock, Work
from hf_devft.federation.heterogeneity.late_updates import LateUpdates
from hf_devft.federation.ledger import RoundRecord
from hf_devft.federation.memory import SERVER, Memory
from hf_devft.federation.methods import FederatedMethod, LocalCorrection, ServerOptimizer
from hf_devft.federation.sampling import Placement
from hf_devft.federation.selection import ClientSelection
from hf_devft.federation.turns import ClientTurn, LocalResult, TrainClients, Trained
from hf_devft.federation.wire import Wire
from hf_devft.models.layout import AdapterLayout, State


logger = logging.getLogger(__name__)

# What processes tell each other of a client, one row of numbers each.
COLUMNS = BYTES, COUNTED, LATE, LOSS, GRAD_NORM, TOKENS, SEEN, FLOPS = range(8)


class QuorumError(RuntimeError):
    """Too few clients of a round returned a finite adapter, however often it was tried."""


@dataclass
class RoundOutcome:
    """What a round came to, over all its attempts.

    Attributes:
        adapter: the new global adapter, flat.
        loss: mean training loss of the clients that were not left out.
        grad_norm: of the last of them.
        sampled: all clients that were sent the adapter; left_out: those of them whose update was left out; late: those
            whose update will count in a later round.
        seconds: by the simulated clock, 0 without one.
        bytes_down, bytes_up: sent to clients, and by them.
        tokens, seen, flops: see `LocalResult`; sums.
        attempts: how often the round was tried.
    """

    adapter: torch.Tensor | None = None
    loss: float = 0.0
    grad_norm: float = 0.0
    sampled: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    tokens: int = 0
    seen: int = 0
    flops: float = 0.0
    attempts: int = 0

    def add(self, sampled: list[int], reports: torch.Tensor) -> int:
        """Take in an attempt: the clients that were asked, and a row of `COLUMNS` for each. Returns how many of them
        counted."""
        counted, late = reports[:, COUNTED] > 0, reports[:, LATE] > 0
        self.attempts += 1
        self.sampled += sampled
        self.left_out += [c for c, counts in zip(sampled, (counted | late).tolist(), strict=True) if not counts]
        self.late += [client for client, is_late in zip(sampled, late.tolist(), strict=True) if is_late]
        self.bytes_up += int(reports[:, BYTES].sum())
        self.tokens += int(reports[:, TOKENS].sum())
        self.seen += int(reports[:, SEEN].sum())
        self.flops += reports[:, FLOPS].sum().item()
        if (used := counted | late).any():
            self.loss = reports[used, LOSS].mean().item()
            self.grad_norm = reports[used, GRAD_NORM][-1].item()
        return int(counted.sum())

    def to_record(
        self, round_index: int, stage: int, names: list[str], seconds: float, peak_memory: int
    ) -> RoundRecord:
        """Return the ledger's record of the round.

        Args:
            names: of all clients. seconds, peak_memory: what it took.
        """
        return RoundRecord(
            round=round_index + 1,
            stage=stage,
            clients=[names[client] for client in self.sampled],
            dropped=[names[client] for client in self.left_out],
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            tokens=self.tokens,
            flops=self.flops,
            seconds=seconds,
            peak_memory=peak_memory,
            loss=self.loss,
            attempts=self.attempts,
            late=[names[client] for client in self.late],
            simulated_seconds=self.seconds,
        )


@dataclass
class Federation:
    """Runs rounds, on one process or on several that each call it alike.

    Attributes:
        method, correction, optimizer: what `federated_method` names; see `make_methods`.
        wire: encodes what travels.
        memory: what outlives a round.
        selection: chooses the clients.
        placement: this process's share of the work.
        names: the clients' names.
        quorum: how many clients of a round must return a finite adapter.
        retries: how often a round below its quorum is tried again with other clients.
        batches_of: (rounds, attempt) -> the batches of this process's clients in them.
        add_up: sums a tensor over the processes, in place.
        gather: (an object of this process) -> those of all processes.
        device: where those sums are made.
    """

    method: FederatedMethod
    correction: LocalCorrection | None
    optimizer: ServerOptimizer | None
    wire: Wire
    memory: Memory
    selection: ClientSelection
    placement: Placement
    names: list[str]
    quorum: int
    retries: int
    batches_of: Callable[[Iterable[int], int], ClientBatches]
    add_up: Callable[[torch.Tensor], None]
    gather: Callable[[Any], list]
    device: torch.device

    def __post_init__(self):
        self._first_error: Exception | None = None
        self.late = LateUpdates(self.memory)
        self.clock = SimulatedClock(self.memory, runs=self.selection.resources is not None)

    # --- stages ---------------------------------------------------------------------------------------------

    def begin_stage(
        self,
        layout: AdapterLayout,
        adapter: torch.Tensor,
        rounds: range,
        done: int,
        shares: dict[int, float],
        flops: list[float],
    ) -> None:
        """Begin a stage, or go on with it.

        Args:
            layout, adapter: its adapters' layout and the global one.
            rounds: all of its rounds; done: how many of them are over.
            shares: the clients that can take part, and the part of the adapter's values that travels to and from each:
                1, or less where it trains an earlier, smaller submodel.
            flops: what a round asks of each client; empty without a clock.
        """
        self.layout, self._shares = layout, shares
        for part in (self.wire, self.late):
            part.begin_stage(layout)
        self.method.begin_stage(layout, adapter)
        if self.correction is not None:
            self.correction.begin_stage(layout)
        if self.optimizer is not None:
            self.optimizer.begin_stage(layout, adapter)
            if (state := self.memory.get(SERVER, "optimizer")) is not None:
                self.optimizer.load_state_dict(state)
        if done == 0:
            self.clock.remember()
        begun = self.clock.remembered()
        self.selection.begin_stage(list(shares), rounds, self._expected_work(flops), begun)
        self.clock.time = begun + sum(self.selection.seconds(index) for index in rounds[:done])
        self._batches = self.batches_of(rounds[done:], 0)

    def end_stage(self, expand: Callable[[State, bool], State]) -> None:
        """End a stage: take what is remembered to full depth. What begins the next one takes it from there.

        Args:
            expand: (tensors, whether they are an adapter's values) -> those at full depth.
        """
        self.method.end_stage()
        if self.optimizer is not None:
            self.optimizer.end_stage()
            self.memory.forget(SERVER, "optimizer")
        self.late.forget(range(len(self.names)))
        self.clock.remember()
        self.memory.carry(lambda name, state: expand(state, self.method.is_adapter(name)))

    def state_dict(self) -> State:
        """Return what a resumed run must find again, by name."""
        if self.optimizer is not None and (state := self.optimizer.state_dict()):
            self.memory.put(SERVER, "optimizer", state)
            self.memory.commit()
        return self.memory.state_dict()

    def residual(self) -> State:
        """Return what the method adds to the base's weights beside the adapter, by module, at the depth of the
        stage."""
        return self.method.residual()

    def _expected_work(self, flops: list[float]) -> Work:
        """Estimate what the stage's rounds ask of each client by the clock, where its first messages stand for
        all (rounds may differ where methods draw or take turns)."""
        sizes, both = self.layout.sizes, 2 if self.correction is not None and self.correction.records else 1
        sent = []
        for client in range(len(flops)):
            share = self._shares.get(client, 0.0)
            down, up = (
                both * round(share * sum(sizes[place] for place in places))
                for places in (self.method.receives(client), self.method.sends(client))
            )
            sent.append(self.wire.bytes_down(down) + self.wire.bytes_up(up))
        return Work([self._shares.get(client, 0.0) * value for client, value in enumerate(flops)], sent)

    # --- a round --------------------------------------------------------------------------------------------

    def run(self, round_index: int, start: torch.Tensor, train_clients: TrainClients) -> RoundOutcome:
        """Run one round from the global adapter `start`: ask clients, train them, combine what they send; where too
        few of them answer, try again with others.

        Args:
            train_clients: does the local training.

        Raises:
            QuorumError: too few clients answered in any attempt; its cause is the first error of a client of this
            process.
        """
        outcome, self._first_error = RoundOutcome(), None
        for attempt in range(self.retries + 1):
            sampled = self.selection.sampled(round_index, attempt)
            batches = self._batches if attempt == 0 else self.batches_of([round_index], attempt)
            reports = self._train_all(round_index, attempt, start, batches, train_clients, outcome)
            counted = outcome.add(sampled, self._of_all_processes(reports))
            arrived = self.late.arrived(self.selection.arrivals(round_index), round_index)
            if counted + len(arrived) >= self.quorum:
                outcome.adapter = self._combine(start, counted, arrived)
                outcome.seconds = self.selection.seconds(round_index)
                self.clock.time += outcome.seconds
                return outcome
            logger.warning(
                f"round {round_index + 1}, attempt {attempt + 1}: {counted} of {len(sampled)} clients returned a "
                f"finite adapter, {self.quorum} are needed."
            )
        raise QuorumError(
            f"round {round_index + 1}: fewer than round_quorum={self.quorum} clients returned a finite adapter in "
            f"{self.retries + 1} attempts. See to the clients, or lower `learning_rate`, `max_grad_norm` or "
            "`round_quorum`; then go on from the last checkpoint with `resume_from_checkpoint`."
        ) from self._first_error

    def _train_all(
        self,
        round_index: int,
        attempt: int,
        start: torch.Tensor,
        batches: ClientBatches,
        train_clients: TrainClients,
        outcome: RoundOutcome,
    ) -> torch.Tensor:
        """Train this process's clients of an attempt; returns their reports, a row for each client of all
        processes."""
        sampled, late = self.selection.sampled(round_index, attempt), self.selection.late(round_index, attempt)
        mine = set(self.placement.clients(self.selection.training(round_index, attempt)))
        self.memory.rollback()
        self.method.begin_round(round_index, start, sampled)
        if self.correction is not None:
            self.correction.begin_round(start)
        correction_message = self.correction.download() if self.correction is not None else None
        if self.correction is not None and correction_message is not None:
            self.correction.arrive(self.wire.down(correction_message))

        def turns() -> Iterator[ClientTurn]:
            for client in sampled:
                message = self.method.download(client)
                outcome.bytes_down += self.wire.bytes_down(self._travelling(client, message))
                if correction_message is not None:
                    outcome.bytes_down += self.wire.bytes_down(correction_message.numel())
                if client in mine:
                    received = self.method.start(client, self.wire.down(message))
                    yield self._turn(round_index, client, received, batches.next_client())

        reports = torch.zeros(len(sampled), len(COLUMNS), dtype=torch.float64)
        for turn, trained in train_clients(turns()):
            reports[sampled.index(turn.client)] = self._receive(turn, trained, turn.client in late)
        return reports

    def _turn(self, round_index: int, client: int, start: torch.Tensor, batches: ClientBatches) -> ClientTurn:
        terms = [self.method.local_gradient] if self.method.corrects else []
        terms += [self.correction.gradient] if self.correction is not None else []

        def gradient(adapter: torch.Tensor) -> torch.Tensor:
            return sum((term(client, start, adapter) for term in terms), torch.zeros(()))

        return ClientTurn(
            round_index=round_index,
            client=client,
            start=start,
            batches=batches,
            trains=self.method.trains(client),
            skips=self.method.skips(client),
            gradient=gradient if terms else None,
            records=self.correction is not None and self.correction.records,
        )

    def _receive(self, turn: ClientTurn, trained: Trained, is_late: bool) -> torch.Tensor:
        """Receive what a client has trained: the method adds it to its sums, unless it has failed. Returns its
        report."""
        report = torch.zeros(len(COLUMNS), dtype=torch.float64)
        if isinstance(trained, Exception):
            if not self.placement.outlives_errors:
                raise trained
            self._first_error = self._first_error or trained
            self._warn(turn, f"failed and was left out: {type(trained).__name__}: {trained}")
            return report
        result, adapter = trained
        report[TOKENS], report[SEEN], report[FLOPS] = result.tokens, result.seen, result.flops
        finite = bool(torch.isfinite(adapter).all())
        if result.mean_gradient is not None:
            finite &= bool(torch.isfinite(result.mean_gradient).all())
        report[BYTES] = self._send(turn, result, adapter, finite, is_late)
        if not finite:
            self._warn(turn, "returned an adapter that is not finite and was left out.")
            return report
        report[LATE if is_late else COUNTED], report[LOSS] = 1, float(result.loss)
        report[GRAD_NORM] = float("nan") if result.grad_norm is None else float(result.grad_norm)
        return report

    def _send(self, turn: ClientTurn, result: LocalResult, adapter: torch.Tensor, finite: bool, is_late: bool) -> int:
        """Send what a client has trained, which counts where it is finite, now or later; returns the bytes."""
        client, method, wire = turn.client, self.method, self.wire
        count = wire.bytes_up(self._travelling(client, method.payload(client, adapter))) + 4 * method.num_extra_values
        correction = None if self.correction is None else self.correction.payload(client, result.mean_gradient)
        count += 0 if correction is None else wire.bytes_up(correction.numel())
        if not finite:
            return count
        method.keep(client, turn.start, adapter)
        pick = partial(method.payload, client)
        message = wire.up(client, adapter, turn.start, pick, error_feedback=method.supports_error_feedback)
        if is_late:
            self.late.keep(client, method.sends(client), message - method.payload(client, turn.start))
        else:
            method.receive(client, turn.start, message)
        if self.correction is not None and correction is not None:
            self.correction.keep(client, result.mean_gradient)
            self.correction.receive(wire.up(client, correction, torch.zeros_like(correction), name="correction"))
        return count

    def _travelling(self, client: int, message: torch.Tensor) -> int:
        """Count the values of a message, as it would be for the submodel that the client trains."""
        return round(message.numel() * self._shares[client])

    def _combine(self, start: torch.Tensor, fresh: int, arrived: dict[int, int]) -> torch.Tensor:
        """Combine this many fresh updates, and those that have arrived late, {client: rounds since}; returns the new
        global adapter."""
        needs_no_merge = self.placement.count == 1 or self.placement.shares_batches
        if not needs_no_merge:
            self.method.merge(self.add_up)
            if self.correction is not None:
                self.correction.merge(self.add_up)
        self.late.add_to(self.method, fresh, arrived)
        adapter = self.method.end_round().to(start.device)
        if self.correction is not None:
            self.correction.end_round()
        self.memory.commit(None if needs_no_merge else self.gather)
        if self.optimizer is not None:
            adapter = self.optimizer.step(start, adapter, self.method.updated)
        return adapter

    def _of_all_processes(self, reports: torch.Tensor) -> torch.Tensor:
        """Put together the clients' reports, each from the process or the processes that trained it."""
        if self.placement.count == 1:
            return reports
        reports = reports.to(self.device)
        self.add_up(reports)
        if self.placement.shares_batches:  # all know the client, each counted its own tokens
            reports[:, : GRAD_NORM + 1] /= self.placement.count
        return reports.cpu()

    def _warn(self, turn: ClientTurn, what: str) -> None:
        logger.warning(f"round {turn.round_index + 1}: client {self.names[turn.client]} {what}")
