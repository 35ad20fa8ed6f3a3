"""The server's half of a communication round: sampled clients are asked, and what they send is combined."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_devft.federation.client_side import Answer, Exchange, FromClient, ToClient
from hf_devft.federation.heterogeneity.clock import SimulatedClock, Work
from hf_devft.federation.heterogeneity.late_updates import LateUpdates
from hf_devft.federation.ledger import RoundRecord
from hf_devft.federation.memory import SERVER, Memory
from hf_devft.federation.methods import AggregationRule, FederatedMethod, LocalCorrection, ServerOptimizer
from hf_devft.federation.privacy import ClientPrivacy
from hf_devft.federation.sampling import Placement
from hf_devft.federation.selection import ClientSelection
from hf_devft.federation.wire import Wire
from hf_devft.files import is_sound
from hf_devft.models.layout import AdapterLayout, State


logger = logging.getLogger(__name__)

# What processes tell each other of a client, one row of numbers each.
COLUMNS = BYTES, COUNTED, LATE, LOSS, GRAD_NORM, TOKENS, PADDING, SEEN, FLOPS = range(9)


class QuorumError(RuntimeError):
    """Too few clients of a round returned a finite adapter, however often it was tried."""


@dataclass
class RoundOutcome:
    """What a round came to, over all its attempts.

    Attributes:
        adapter: the new global adapter, flat.
        loss: mean training loss of the clients that were not left out; NaN where none of them knows it.
        losses: of each of them, by its number. grad_norm: of the last of them.
        sampled: all clients that were sent the adapter; left_out: those of them whose update was left out; late: those
            whose update will count in a later round.
        seconds: by the simulated clock, 0 without one.
        bytes_down, bytes_up: sent to clients, and by them.
        tokens, padding, seen, flops: see `LocalResult`; sums.
        attempts: how often the round was tried.
    """

    adapter: torch.Tensor | None = None
    loss: float = math.nan
    losses: dict[int, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    sampled: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    tokens: int = 0
    padding: int = 0
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
        self.padding += int(reports[:, PADDING].sum())
        self.seen += int(reports[:, SEEN].sum())
        self.flops += reports[:, FLOPS].sum().item()
        if (used := counted | late).any():
            self.loss = reports[used, LOSS].nanmean().item()  # of those that know theirs
            taken = [client for client, is_used in zip(sampled, used.tolist(), strict=True) if is_used]
            self.left_out = [client for client in self.left_out if client not in taken]  # of an earlier attempt
            self.losses |= dict(zip(taken, reports[used, LOSS].tolist(), strict=True))
            self.grad_norm = reports[used, GRAD_NORM][-1].item()
        return int(counted.sum())

    def discard(self, sampled: list[int]) -> None:
        """Take back what the clients of the last attempt have brought, as too few of them did."""
        self.left_out = [client for client in self.left_out if client not in sampled] + sampled
        self.late = [client for client in self.late if client not in sampled]
        self.losses = {client: loss for client, loss in self.losses.items() if client not in sampled}
        self.loss = math.nan

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
            padding=self.padding,
            flops=self.flops,
            seconds=seconds,
            peak_memory=peak_memory,
            loss=None if math.isnan(self.loss) else self.loss,
            attempts=self.attempts,
            late=[names[client] for client in self.late],
            simulated_seconds=self.seconds,
        )

    def to_private_record(self, epsilon: float, drawn_from: int | None, **of_the_round: Any) -> RoundRecord:
        """Return the ledger's record of a differentially private round: who took part, with which loss, on how many
        tokens and in how much memory, stays untold, as no noise covers it.

        Args:
            epsilon, drawn_from: see `RoundRecord`.
            of_the_round: the arguments of `to_record`; bytes must not tell how many took part, see
                `Federation.expected_bytes`.
        """
        untold: dict[str, Any] = {"clients": [], "dropped": [], "late": [], "loss": None}
        untold |= {"tokens": 0, "padding": 0, "flops": 0.0, "peak_memory": 0}
        return replace(self.to_record(**of_the_round), epsilon=epsilon, drawn_from=drawn_from, **untold)


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
        add_up: sums a tensor over the processes, in place.
        gather: (an object of this process) -> those of all processes.
        device: where those sums are made.
        rule: takes the place of the mean, or None; see `make_methods`.
        privacy: what makes a round's mean differentially private, or None.
        is_private: whether rounds are accounted for, so that each is run once, whoever chance leaves in it.
        sees_sums_only: whether updates come as secure sums, so that no second one is asked for of a round.
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
    add_up: Callable[[torch.Tensor], None]
    gather: Callable[[Any], list]
    device: torch.device
    rule: AggregationRule | None = None
    privacy: ClientPrivacy | None = None
    is_private: bool = False
    sees_sums_only: bool = False

    def __post_init__(self):
        self._first_error: Exception | None = None
        self._updates: dict[int, torch.Tensor] = {}  # of a robust rule's round, by client
        self.late = LateUpdates(self.memory)
        self.clock = SimulatedClock(self.memory, runs=self.selection.resources is not None)

    # --- stages ---------------------------------------------------------------------------------------------

    def begin_stage(
        self,
        layout: AdapterLayout,
        adapter: torch.Tensor,
        rounds: range,
        done: int,
        elapsed: float,
        shares: dict[int, float],
        flops: list[float],
    ) -> None:
        """Begin a stage, or go on with it.

        Args:
            layout, adapter: its adapters' layout and the global one.
            rounds: all of its rounds; done: how many of them are over; elapsed: what these took by the clock.
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
        self.clock.time = begun + elapsed

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

    def _expected_work(self, flops: list[float]) -> Work:
        """Estimate what the stage's rounds ask of each client by the clock, where its first messages stand for
        all (rounds may differ where methods draw or take turns)."""
        sent = [sum(self._message_bytes(client)) for client in range(len(flops))]
        return Work([self._shares.get(client, 0.0) * value for client, value in enumerate(flops)], sent)

    def _message_bytes(self, client: int) -> tuple[int, int]:
        """Bytes of a client's first messages of a stage, to it and from it."""
        both = 2 if self.correction is not None and self.correction.records else 1
        share = self._shares.get(client, 0.0)
        down, up = (round(share * values) for values in self.method.message_sizes(client))
        return both * self.wire.bytes_down(down), both * self.wire.bytes_up(up)

    def expected_bytes(self, clients: int) -> tuple[int, int]:
        """Count the bytes, to clients and from them, of a round of so many of the largest messages, however many take
        part and answer."""
        down, up = self._message_bytes(max(self._shares, key=self._shares.__getitem__))
        return clients * down, clients * (up + 4 * self.method.num_extra_values)

    # --- a round --------------------------------------------------------------------------------------------

    def run(self, round_index: int, start: torch.Tensor, exchange: Exchange) -> RoundOutcome:
        """Run one round from the global adapter `start`: ask clients, combine what they send; where too few of them
        answer, try again with others.

        Args:
            exchange: takes messages to clients, and brings back what they send.

        Raises:
            QuorumError: too few clients answered in any attempt; its cause is the first error of a client of this
            process.
        """
        outcome, self._first_error = RoundOutcome(), None
        for attempt in range(self.retries + 1):
            sampled = self.selection.sampled(round_index, attempt)
            reports = self._ask_all(round_index, attempt, start, exchange, outcome)
            counted = outcome.add(sampled, self._of_all_processes(reports))
            outcome.seconds += self.selection.seconds(round_index, attempt)
            arrived = self.late.arrived(self.selection.arrivals(round_index), round_index)
            if counted + len(arrived) >= self._needed(round_index, attempt):
                nobody = not counted and not arrived and self.privacy is None
                outcome.adapter = start if nobody else self._combine(round_index, start, counted, arrived)
                self.clock.time += outcome.seconds
                return outcome
            outcome.discard(sampled)
            logger.warning(
                f"round {round_index + 1}, attempt {attempt + 1}: {counted} of {len(sampled)} clients returned a "
                f"finite adapter, {self.quorum} are needed."
            )
            if counted and self.sees_sums_only:  # another sum, of other clients, would differ by single updates
                break
        error = self._first_error
        failed = f" The first error: {type(error).__name__}: {error}" if error else ""
        trained = self.selection.training(round_index, attempt)
        advice = "Lower `learning_rate` or `max_grad_norm`" if trained else "Raise `clients_per_round`"
        advice = "Mend what has failed" if error else advice
        raise QuorumError(
            f"round {round_index + 1}: fewer than round_quorum={self.quorum} clients returned a finite adapter in "
            f"{attempt + 1} attempts. {advice}, or lower `round_quorum`; then go on with "
            f"`resume_from_checkpoint`, from the last checkpoint or an earlier one.{failed}"
        ) from error

    def _needed(self, round_index: int, attempt: int) -> int:
        """How many clients must answer: the quorum, or all that chance has drawn; in a private run, where no round is
        tried again, all of them that do not drop out. Where noise covers each client, nobody need answer unless a
        quorum asks for more than one: a round that chance draws nobody for is released, too."""
        if self.privacy is not None and self.quorum == 1:
            return 0
        drawn = self.selection.training if self.is_private else self.selection.sampled
        return min(self.quorum, len(drawn(round_index, attempt)))

    def _ask_all(
        self, round_index: int, attempt: int, start: torch.Tensor, exchange: Exchange, outcome: RoundOutcome
    ) -> torch.Tensor:
        """Ask this process's clients of an attempt; returns their reports, a row for each client of all processes."""
        sampled, late = self.selection.sampled(round_index, attempt), self.selection.late(round_index, attempt)
        mine = set(self.placement.clients(self.selection.training(round_index, attempt)))
        self.memory.rollback()
        self.method.begin_round(round_index, start, sampled)
        self._updates = {}
        if self.privacy is not None:
            self.privacy.begin_round()
        extra = None
        if self.correction is not None:
            self.correction.begin_round(start)
            extra = self.correction.download()
        correction = None if extra is None else self.wire.down(extra)

        def messages() -> Iterator[ToClient]:
            for client in sampled:
                values = self.method.download(client)
                exact = self.method.exact_values(client)
                outcome.bytes_down += self.wire.bytes_down(self._travelling(client, values.numel() - exact))
                outcome.bytes_down += 4 * self._travelling(client, exact)
                if extra is not None:
                    outcome.bytes_down += self.wire.bytes_down(extra.numel())
                if client in mine:
                    yield ToClient(round_index, client, self.wire.down(values), correction)

        reports = torch.zeros(len(sampled), len(COLUMNS), dtype=torch.float64)
        for message, answer in exchange(round_index, attempt, messages()):
            reports[sampled.index(message.client)] = self._receive(message, answer, message.client in late)
        return reports

    def _receive(self, message: ToClient, answer: Answer, is_late: bool) -> torch.Tensor:
        """Receive what a client has sent: the method adds it to its sums, unless the client has failed. Returns its
        report."""
        report = torch.zeros(len(COLUMNS), dtype=torch.float64)
        if isinstance(answer, Exception):
            if not self.placement.outlives_errors:
                raise answer
            self._first_error = self._first_error or answer
            self._warn(message, f"failed and was left out: {type(answer).__name__}: {answer}")
            return report
        result = answer.result
        report[TOKENS], report[SEEN], report[FLOPS] = result.tokens, result.seen, result.flops
        report[PADDING] = float(result.padding)
        report[BYTES] = self.wire.bytes_up(self._travelling(message.client, answer.count))
        report[BYTES] += self.wire.bytes_up(answer.correction_count) + 4 * self.method.num_extra_values
        if not self._take(message, answer, is_late):
            self._warn(message, "returned an adapter that is not finite, or has values above 1e6, and was left out.")
            return report
        report[LATE if is_late else COUNTED], report[LOSS] = 1, float(result.loss)
        report[GRAD_NORM] = float("nan") if result.grad_norm is None else float(result.grad_norm)
        return report

    def _take(self, message: ToClient, answer: FromClient, is_late: bool) -> bool:
        """Take a client's message into the sums, now or later; False where it has values that are not finite, or
        absurd: the server looks for itself, whatever the client says."""
        if answer.adapter is None:
            return False
        client, method = message.client, self.method
        start = method.start(client, message.adapter.decoded)
        known = method.payload(client, start)
        values = answer.adapter.arrive(known)
        correction = None if answer.correction is None else answer.correction.decoded
        if not all(is_sound(each) for each in (values, correction) if each is not None):
            return False
        if is_late:
            self.late.keep(client, method.sends(client), values - known)
        elif self.rule is not None:
            self._updates[client] = (method.wide(values) - method.wide(known)).cpu()
        elif self.privacy is not None:
            known = method.wide(known)
            method.receive(client, start, known + self.privacy.clip(method.wide(values) - known))
        else:
            method.receive(client, start, values)
        if self.correction is not None and correction is not None:
            self.correction.receive(client, correction)
        return True

    def _travelling(self, client: int, count: int) -> int:
        """Count the values of a message of `count`, as it would be for the submodel that the client trains."""
        return round(count * self._shares[client])

    def _combine(self, round_index: int, start: torch.Tensor, fresh: int, arrived: dict[int, int]) -> torch.Tensor:
        """Combine this many fresh updates, and those that have arrived late, {client: rounds since}; returns the new
        global adapter."""
        needs_no_merge = self.placement.count == 1 or self.placement.shares_batches
        if self.rule is not None:
            self._agree(self.rule, start, self.gather if not needs_no_merge else None)
        if not needs_no_merge:
            self.method.merge(self.add_up)
            if self.correction is not None:
                self.correction.merge(self.add_up)
            if self.privacy is not None:
                self.privacy.merge(self.add_up, self.device)
        if self.privacy is not None:
            self.privacy.end_round(self.method, round_index)
        self.late.add_to(self.method, fresh, arrived)
        adapter = self.method.end_round().to(start.device)
        if self.correction is not None:
            self.correction.end_round()
        self.memory.commit(None if needs_no_merge else self.gather)
        if self.optimizer is not None:
            adapter = self.optimizer.step(start, adapter, self.method.updated)
        return adapter

    def _agree(self, rule: AggregationRule, start: torch.Tensor, gather: Callable[[Any], list] | None) -> None:
        """Put one update in the place of each client's of the round: the one that the rule makes of all."""
        mine = self._updates
        everyone: dict[int, torch.Tensor] = {}
        for theirs in gather(mine) if gather is not None else [mine]:
            everyone |= theirs
        if len(everyone) < rule.needs:  # in a private run, where chance may leave fewer; the adapter stays
            return
        clients, self._updates = sorted(everyone), {}
        weights = torch.tensor([self.method.clients.examples[client] for client in clients], dtype=torch.float64)
        weights = weights.clamp_max(weights.median())  # as a client may claim any number of rows
        agreed = rule.combine(torch.stack([everyone[client] for client in clients]), weights)
        for client in mine:
            known = self.method.wide(self.method.payload(client, start))
            self.method.receive(client, start, known + agreed.to(known.device))

    def _of_all_processes(self, reports: torch.Tensor) -> torch.Tensor:
        """Put together the clients' reports, each from the process or the processes that trained it."""
        if self.placement.count == 1:
            return reports
        reports = reports.to(self.device)
        self.add_up(reports)
        if self.placement.shares_batches:  # all know the client, each counted its own tokens
            reports[:, : GRAD_NORM + 1] /= self.placement.count
        return reports.cpu()

    def _warn(self, message: ToClient, what: str) -> None:
        logger.warning(f"round {message.round_index + 1}: client {self.names[message.client]} {what}")
