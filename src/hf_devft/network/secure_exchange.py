"""A round whose server sees only the sum of what its clients send."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from flwr.app import ConfigRecord, MessageType, RecordDict

from hf_devft.federation.client_side import Answer, FromClient, ToClient
from hf_devft.federation.encoding import Encoded
from hf_devft.network.messages import (
    KEYS,
    REVEAL,
    SHARES,
    TOLD,
    ClientError,
    Reply,
    by_client,
    record_of,
    to_clients,
    typed,
    why_refused,
)
from hf_devft.network.secure_sum import PUBLIC_BYTES, SecureSumError, from_fixed, unmask


T = TypeVar("T")


class Clients(Protocol):
    """The server's way to its clients; see `RemoteClients`."""

    timeout: float | None

    @property
    def examples(self) -> list[int]:
        """What each client's update counts for, by number."""
        ...

    def ask(self, records: dict[int, RecordDict], kind: str, timeout: float | None) -> Iterator[tuple[int, Reply]]:
        """Send records to nodes; yields each node's reply."""
        ...

    def turn(self, node: int, message: ToClient, learning_rate: float, weight: float) -> RecordDict:
        """Make the records of a turn."""
        ...

    def read(self, message: ToClient, reply: Reply) -> Answer:
        """Read what a client sends back."""
        ...

    def known(self, message: ToClient) -> torch.Tensor:
        """Return the values that a client's update is a change of."""
        ...

    def ask_for_training(
        self, turns: dict[int, RecordDict], again: Callable[[int], RecordDict]
    ) -> Iterator[tuple[int, Reply]]:
        """Send turns to nodes; yields each node's reply."""
        ...


def sum_securely(
    clients: Clients, asked: dict[int, ToClient], learning_rate: float
) -> Iterator[tuple[ToClient, Answer]]:
    """Carry messages to clients, by their nodes, and back; what is said of each client's update is the mean of all, so
    that sums of updates are what they are. See `secure_sum`."""
    attempt = SecureRound(clients, asked, learning_rate)
    try:
        mean = attempt.run()
    except SecureSumError as error:
        nothing = ClientError(f"no sum could be made: {error}")
        yield from ((message, attempt.failed.get(message.client, nothing)) for message in asked.values())
        return
    for message in asked.values():
        if (answer := attempt.answers.get(message.client)) is None:
            yield message, attempt.failed.get(message.client, ClientError("it has not answered"))
        else:
            values = clients.known(message) + torch.from_numpy(mean).float()
            yield message, replace(answer, adapter=Encoded(values, values.numel()))


class SecureRound:
    """A round's secure sum, from keys to shares.

    Args:
        clients: the way to them. asked: messages, by node. learning_rate: of the round.

    Attributes:
        failed: why a client has failed; answers: those that have sent an update, masked. By the clients' numbers.
    """

    def __init__(self, clients: Clients, asked: dict[int, ToClient], learning_rate: float):
        self._clients, self._asked, self._learning_rate = clients, asked, learning_rate
        self._node_of = {message.client: node for node, message in asked.items()}
        self.failed: dict[int, Exception] = {}
        self.answers: dict[int, FromClient] = {}

    def run(self) -> np.ndarray:
        """Return the mean of the updates that have arrived, weighted by examples.

        Raises:
            SecureSumError: too few clients are left at one of the steps.
        """
        keys = {client: RecordDict({KEYS: ConfigRecord({"client": client})}) for client in self._node_of}
        public = dict(self._ask(keys, KEYS, _public_keys))
        threshold = max(2, len(self._asked) // 2 + 1)
        _check(len(public), threshold, "sent their keys")
        share = RecordDict({SHARES: ConfigRecord({"threshold": threshold}), TOLD: to_clients(public)})
        told = dict(self._ask(dict.fromkeys(public, share), SHARES, by_client))
        for client in [client for client, words in told.items() if words.keys() != public.keys() - {client}]:
            self.failed[client] = ClientError("it has not told every other client of its masks")
            del told[client]
        _check(len(told), threshold, "told the others of their masks")
        examples = self._clients.examples
        total = sum(examples[client] for client in told)
        weights = {client: examples[client] / total for client in told}
        self._take_turns(told, weights)
        arrived, missing = sorted(self.answers), sorted(set(told) - set(self.answers))
        _check(len(arrived), threshold, "sent an update")
        reveal = RecordDict({REVEAL: ConfigRecord({"arrived": arrived, "missing": missing})})
        revealed = [shares for _, shares in self._ask(dict.fromkeys(arrived, reveal), REVEAL, by_client)]
        total = sum((_numbers(self.answers[client]) for client in arrived), np.uint32(0))
        mean = from_fixed(unmask(total, public, arrived, missing, revealed, threshold))
        return mean / sum(weights[client] for client in arrived)

    def _ask(
        self, records: dict[int, RecordDict], name: str, parse: Callable[[ConfigRecord], T]
    ) -> Iterator[tuple[int, T]]:
        """Ask clients for a record, and read it; notes failures."""
        by_node = {self._node_of[client]: content for client, content in records.items()}
        for node, reply in self._clients.ask(by_node, f"{MessageType.QUERY}.{name}", self._clients.timeout):
            client = self._asked[node].client
            try:
                parsed = parse(record_of(_accepted(reply), name))
            except (ClientError, ValueError) as error:
                self.failed[client] = error
                continue
            yield client, parsed

    def _take_turns(self, told: dict[int, dict[int, bytes]], weights: dict[int, float]) -> None:
        """Have clients train and mask their updates; each is given what the others have told it."""

        def turn(node: int) -> RecordDict:
            client = self._asked[node].client
            records = self._clients.turn(node, self._asked[node], self._learning_rate, weights[client])
            records[TOLD] = to_clients({other: told[other][client] for other in told if other != client})
            return records

        turns = {node: turn(node) for node in map(self._node_of.__getitem__, told)}
        for node, reply in self._clients.ask_for_training(turns, turn):
            client = self._asked[node].client
            answer = self._clients.read(self._asked[node], reply)
            if isinstance(answer, Exception):
                self.failed[client] = answer
            elif answer.adapter is None:
                self.failed[client] = ClientError("its update is not finite")
            else:
                self.answers[client] = answer


def _public_keys(record: ConfigRecord) -> bytes:
    keys = typed(record, "public", bytes)
    if len(keys) != PUBLIC_BYTES:
        raise ValueError(f"its public keys have {len(keys)} bytes, not {PUBLIC_BYTES}")
    return keys


def _check(count: int, needed: int, what: str) -> None:
    if count < needed:
        raise SecureSumError(f"{count} clients have {what}, {needed} are needed")


def _numbers(answer: FromClient) -> np.ndarray:
    """What a client has sent in place of its update: as many bytes, of masked numbers."""
    assert answer.adapter is not None
    return answer.adapter.values.numpy().view("<u4")


def _accepted(reply: Reply) -> RecordDict:
    if isinstance(reply, ClientError):
        raise reply
    if (why := why_refused(reply)) is not None:
        raise ClientError(why)
    return reply
