"""The server's way to its clients: turns go out as Flower's messages, what they train comes back."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import DEFAULT_TTL, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from hf_devft.federation.client_side import Answer, Exchange, ToClient
from hf_devft.federation.memory import SERVER
from hf_devft.federation.partition import ClientData, clients_elsewhere
from hf_devft.federation.rounds import Federation
from hf_devft.models.layout import State
from hf_devft.network.attendance import Attendance, some_of
from hf_devft.network.fingerprints import hash_of_tokenizer, hash_of_weights
from hf_devft.network.messages import (
    NO_STAGE,
    STAGE,
    TRAIN,
    TRAINED,
    ClientError,
    Joining,
    Reply,
    StageMessage,
    Turn,
    answer_from_record,
    one_line,
    record_of,
    why_refused,
)
from hf_devft.network.polling import pause
from hf_devft.network.secure_exchange import sum_securely
from hf_devft.network.settings import shared_settings
from hf_devft.run.checkpoint import load_federation
from hf_devft.trainer.active_stage import ActiveStage
from hf_devft.trainer.federated_run import FederatedRun


logger = logging.getLogger(__name__)

# Seconds for an answer to who a node is, before a run (Flower's own SuperNode starts a process for it) and between two
# rounds, which wait for it; a node that is busy is asked again.
JOIN_TIMEOUT, LATE_JOIN_TIMEOUT = 60.0, 5.0
# Under which the server remembers in which round a client has counted last, and which run this is.
_COUNTED, _RUN = "counted", "run"


@dataclass
class Traffic:
    """Bytes that have gone to clients and come from them, all that Flower's messages hold."""

    down: int = 0
    up: int = 0


@dataclass
class RemoteClients:
    """Carries messages to the clients of a run, and back.

    Attributes:
        grid: Flower's, of the run.
        timeout: seconds that a turn may take before its client is left out; None for no limit.
        keys: see `Attendance`.
        traffic: what has gone over the network.
    """

    grid: Grid
    timeout: float | None = None
    keys: Mapping[str, ec.EllipticCurvePublicKey] | None = None
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self):
        self.attendance = Attendance(self.grid.get_node_ids, self.ask, self.keys)
        self._has_stage: dict[int, str] = {}  # node -> key of the stage that it was sent last
        self._counted_then: list[dict[int, int]] = []  # at each checkpoint that the run may go back to

    # --- who is there ---------------------------------------------------------------------------------------

    def wait_for(
        self,
        count: int,
        names: Sequence[str] = (),
        settings: str = "",
        timeout: float | None = JOIN_TIMEOUT,
    ) -> ClientData:
        """Wait until `count` clients have joined.

        Args:
            settings: of the run to come, for clients that measure what they can train; see `shared_settings`.
            names: of all clients, where they are known: others are refused, and those that are missing may join later.
                Without, the `count` clients are all, in the order of their names.
            timeout: seconds for a node's answer, after which it is asked again; None asks once, and waits for all.

        Raises:
            ValueError: all have been asked once, and too few have joined.
        """
        there, said, started = self.attendance, -1, time.monotonic()
        there.names, there.settings = list(names), settings
        while len(there.node_of) < count:
            there.greet(timeout)
            if len(there.node_of) != said:
                said = len(there.node_of)
                logger.info(f"{said} of {count} clients have joined: {some_of(sorted(there.node_of))}.")
            if said < count and timeout is None:
                raise ValueError(f"{said} of {count} clients can join; of the others: {some_of(there.refusals, 1)}.")
            if said < count:
                time.sleep(pause(time.monotonic() - started))
        there.names = there.names or sorted(there.node_of)[:count]
        self.clients = clients_elsewhere(self.names)
        self._note_examples()
        return self.clients

    @property
    def names(self) -> list[str]:
        """The clients, by number, once they are known; see `wait_for`."""
        return self.attendance.names

    @property
    def max_layers(self) -> list[int] | None:
        """Most layers that each client can train, by number; None where no client says a limit."""
        joined = self.attendance.joined
        limits = [joined[name].max_layers if name in joined else 0 for name in self.names]
        return [limit or 10**6 for limit in limits] if any(limits) else None

    def _note_examples(self) -> None:
        for client, joining in self._joined():
            self.clients.elsewhere[client] = joining.examples

    def _note_joinings(self) -> None:
        """Take note of what clients have, and plan the stages to come with what those who have joined late can train;
        a private run's are accounted for as they were planned."""
        self._note_examples()
        run = self._run
        for client, joining in self._joined():
            if joining.max_layers and not run.args.is_private:
                run.capacities.lower(client, joining.max_layers, run.args.clients_per_round)

    def _joined(self) -> Iterator[tuple[int, Joining]]:
        """The clients that are there, by number."""
        joined = self.attendance.joined
        return ((client, joined[name]) for client, name in enumerate(self.names) if name in joined)

    # --- a run, its stages ----------------------------------------------------------------------------------

    def begin_run(self, run: FederatedRun, federation: Federation, processor: Any) -> None:
        """Begin a run, or go on with one."""
        self._run, self._federation, self._processor = run, federation, processor
        if federation.memory.get(SERVER, _RUN) is None:
            number = int.from_bytes(os.urandom(7), "big")
            federation.memory.put(SERVER, _RUN, {"number": torch.tensor(number)})
            federation.memory.commit()
        self.attendance.settings = shared_settings(run.args, run.adapter.config)
        self._has_stage.clear()

    def begin_stage(self, active: ActiveStage, rounds: range) -> None:
        """Begin a stage, or go on with it: make what its clients are sent once."""
        method, layout = self._federation.method, active.engine.layout
        values, places = active.adapter.cpu(), method.untransmitted
        initial = self._federation.memory.get(SERVER, "initial")
        parts = [
            initial[layout.keys[place]].flatten() if initial else layout.pick(values, (place,)) for place in places
        ]
        path = self._run.healed.path(active.record.stage)
        message = StageMessage(
            key="",
            run=f"{int(self._federation.memory.get(SERVER, _RUN)['number']):014x}",
            settings=self.attendance.settings,
            records=self._run.stages[: active.record.stage],
            num_clients=len(self.names),
            places=list(places),
            untransmitted=torch.cat(parts).numpy().tobytes() if parts else b"",
            taught=path.read_bytes() if active.record.is_taught else b"",
            base_hash=hash_of_weights(active),
            tokenizer_hash=hash_of_tokenizer(self._processor),
        )
        self._stage_key = message.to_record().object_id
        self._stage = replace(message, key=self._stage_key).to_record()

    def may_go_back_to(self, folders: Iterable[Path]) -> None:
        """Have clients keep what they had at these checkpoints, beside their last states."""
        self._counted_then = [_counted_rounds(load_federation(folder)) for folder in folders]

    def end_stage(self) -> None:
        """End a stage."""
        del self._stage, self._stage_key

    # --- a round --------------------------------------------------------------------------------------------

    def exchange(self, learning_rate: float) -> Exchange:
        """Return what carries messages to the clients and back, in a round with this learning rate."""
        return partial(self._exchange, learning_rate)

    def _exchange(
        self, learning_rate: float, round_index: int, attempt: int, messages: Iterator[ToClient]
    ) -> Iterator[tuple[ToClient, Answer]]:
        self.attendance.greet(LATE_JOIN_TIMEOUT)
        self._note_joinings()
        asked: dict[int, ToClient] = {}
        for message in messages:
            name = self.names[message.client]
            if (node := self.attendance.node_of.get(name)) is None:
                yield message, ClientError("it is not connected")
            else:
                asked[node] = message
        if self._run.args.secure_aggregation:
            yield from sum_securely(self, asked, learning_rate)
        else:
            yield from in_order(list(asked.values()), self._ask_openly(asked, learning_rate))

    def _ask_openly(self, asked: dict[int, ToClient], learning_rate: float) -> Iterator[tuple[ToClient, Answer]]:
        def turn(node: int) -> RecordDict:
            return self.turn(node, asked[node], learning_rate)

        for node, reply in self.ask_for_training({node: turn(node) for node in asked}, turn):
            yield asked[node], self.read(asked[node], reply)

    def ask_for_training(
        self, turns: dict[int, RecordDict], again: Callable[[int], RecordDict]
    ) -> Iterator[tuple[int, Reply]]:
        """Send turns to nodes; yields each node's reply as it comes, or why there is none.

        Args:
            again: node -> its turn, with the stage, for one that does not know the stage: it was started anew.
        """
        started, anew = time.monotonic(), {}
        for node, reply in self.ask(turns, MessageType.TRAIN, self.timeout):
            if isinstance(reply, RecordDict) and why_refused(reply) == NO_STAGE:
                self._has_stage.pop(node, None)
                self.attendance.renew(node, reply)
                self._note_joinings()
                anew[node] = again(node)
            else:
                yield node, reply
        left = None if self.timeout is None else max(1.0, self.timeout - (time.monotonic() - started))
        yield from self.ask(anew, MessageType.TRAIN, left)

    def turn(self, node: int, message: ToClient, learning_rate: float, weight: float = 0.0) -> RecordDict:
        """Make the records of a turn, with the stage's where the node does not have it.

        Args:
            weight: of the client's update in a secure sum; 0 where it is sent as it is.
        """
        counted = self._federation.memory.get(message.client, _COUNTED)
        state_round = -1 if counted is None else int(counted["round"])
        needed = sorted({then[message.client] for then in self._counted_then if message.client in then})
        dtype = self._federation.wire.dtype
        turn = Turn.of(message, dtype, self._stage_key, learning_rate, state_round, needed, weight)
        records = RecordDict({TRAIN: turn.to_record()})
        if self._has_stage.get(node) != self._stage_key:
            records[STAGE] = self._stage
            self._has_stage[node] = self._stage_key
        return records

    def read(self, message: ToClient, reply: Reply) -> Answer:
        """Read what a client sends back; the error that it failed with, or is."""
        federation, client = self._federation, message.client
        if isinstance(reply, ClientError):
            return reply
        if (why := why_refused(reply)) is not None:
            return ClientError(why)
        count = self.known(message).numel()
        records = federation.correction is not None and federation.correction.records
        try:
            record = record_of(reply, TRAINED)
            extra = sum(federation.layout.sizes) if records else 0
            answer, remembers = answer_from_record(record, federation.wire, count, extra)
        except ValueError as error:
            return ClientError(f"it sent something else than its update: {error}")
        if remembers:
            federation.memory.put(client, _COUNTED, {"round": torch.tensor(message.round_index)})
        return answer

    def known(self, message: ToClient) -> torch.Tensor:
        """Return the values that a client's update is a change of."""
        method = self._federation.method
        return method.payload(message.client, method.start(message.client, message.adapter.decoded))

    @property
    def examples(self) -> list[int]:
        """What each client's update counts for, by number."""
        return list(self._federation.method.clients.examples)

    # --- messages -------------------------------------------------------------------------------------------

    def ask(self, records: dict[int, RecordDict], kind: str, timeout: float | None) -> Iterator[tuple[int, Reply]]:
        """Send records to nodes; yields each node's reply as it comes, or why there is none."""
        nodes: dict[str, int] = {}
        for node, content in records.items():
            number = self._push(Message(content, node, kind, ttl=timeout or DEFAULT_TTL))
            if number is None:
                yield node, ClientError("its message could not be sent: it is gone, or the message is too large")
                continue
            nodes[number] = node
            self.traffic.down += _size(content)
        started = time.monotonic()
        while nodes:
            for number, reply in self._pull(list(nodes)):
                if not isinstance(reply, ClientError):
                    self.traffic.up += _size(reply)
                yield nodes.pop(number), reply
            waited = time.monotonic() - started
            if nodes and timeout is not None and waited > timeout:
                late = ClientError(f"it has not answered in {timeout:.0f} seconds")
                yield from ((node, late) for node in nodes.values())
                return
            if nodes:
                time.sleep(pause(waited))

    def _push(self, message: Message) -> str | None:
        """Send a message; returns its number, None where Flower does not take it."""
        return next(iter(self.grid.push_messages([message])), None) or None  # an empty one, of protobuf

    def _pull(self, numbers: list[str]) -> Iterator[tuple[str, Reply]]:
        """Fetch the replies to messages, as far as they are there; one that cannot be read is a client's error.

        One by one: Flower forgets what it has handed out, so that one that cannot be read would take others with it;
        and a reply's own metadata, which its sender writes, do not say whose it is.
        """
        for number in numbers:
            try:
                reply = next(iter(self.grid.pull_messages([number])), None)
            except (OSError, httpx.HTTPError) as error:
                logger.warning(f"the SuperLink does not answer: {error}.")
            except Exception as error:
                yield number, ClientError(f"its answer cannot be read: {type(error).__name__}: {one_line(str(error))}")
            else:
                if reply is not None:
                    yield number, ClientError(one_line(reply.error.reason)) if reply.has_error() else reply.content


def _counted_rounds(state: State) -> dict[int, int]:
    """The round in which each client has counted last, in what the server remembers; see `Memory.state_dict`."""
    end = f"/{_COUNTED}/round"
    return {int(path.removesuffix(end)): int(counted) for path, counted in state.items() if path.endswith(end)}


def _size(content: RecordDict) -> int:
    """Bytes of a message's content, as Flower sends it."""
    return sum(len(record.deflate()) for record in content.values())


def in_order(
    messages: Sequence[ToClient], answers: Iterable[tuple[ToClient, Answer]]
) -> Iterator[tuple[ToClient, Answer]]:
    """Give answers in the order of the messages, however they arrive: a sum has the same rounding in every run. One
    that is early waits for those before it."""
    early: dict[int, tuple[ToClient, Answer]] = {}
    left = deque(message.client for message in messages)
    for message, answer in answers:
        early[message.client] = message, answer
        while left and left[0] in early:
            yield early.pop(left.popleft())
    yield from (early[client] for client in left if client in early)  # after one that was not heard of
