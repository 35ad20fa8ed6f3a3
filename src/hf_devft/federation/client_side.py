"""A client's half of a round: from the message that it gets to the one that it sends."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from hf_devft.federation.encoding import Encoded
from hf_devft.federation.methods import FederatedMethod, LocalCorrection
from hf_devft.federation.turns import ClientTurn, LocalResult, TrainClients, Trained
from hf_devft.federation.wire import Wire
from hf_devft.files import is_sound


@dataclass(frozen=True)
class ToClient:
    """What a client is sent.

    Attributes:
        round_index, client: which. adapter: what the method has it receive.
        correction: what the correction has it receive, or None.
    """

    round_index: int
    client: int
    adapter: Encoded
    correction: Encoded | None = None


@dataclass(frozen=True)
class FromClient:
    """What a client sends back.

    Attributes:
        result: what its local training came to.
        adapter: its message; None where what it has trained is not finite, or has values above 1e6.
        count: how many values the message stands for.
        correction, correction_count: the same of the correction's message; None and 0 without one.
    """

    result: LocalResult
    adapter: Encoded | None
    count: int
    correction: Encoded | None = None
    correction_count: int = 0


# What came back, or the error that the client failed with.
Answer = FromClient | Exception
# (round, attempt, messages to clients) -> the messages with what came back; clients not heard of are left out.
Exchange = Callable[[int, int, Iterator[ToClient]], Iterator[tuple[ToClient, Answer]]]


@dataclass(frozen=True)
class ClientSide:
    """What a client does with a message, before and after its training.

    In a simulation it shares all that it is made of with the server; elsewhere each client has its own, and in
    `memory` what stays with it.

    Attributes:
        method, correction: see `make_methods`. wire: encodes what is sent.
    """

    method: FederatedMethod
    correction: LocalCorrection | None
    wire: Wire

    def begin(self, message: ToClient, batches: Iterable) -> ClientTurn:
        """Make the local training that a message asks for.

        Args:
            batches: the client's.
        """
        client, terms = message.client, []
        start = self.method.start(client, message.adapter.decoded)
        if self.method.corrects:
            terms.append(self.method.local_gradient)
        if self.correction is not None:
            terms.append(self.correction.gradient)
            if message.correction is not None:
                self.correction.arrive(message.correction.decoded)

        def gradient(adapter: torch.Tensor) -> torch.Tensor:
            return sum((term(client, start, adapter) for term in terms), torch.zeros(()))

        return ClientTurn(
            round_index=message.round_index,
            client=client,
            start=start,
            batches=batches,
            trains=self.method.trains(client),
            skips=self.method.skips(client),
            gradient=gradient if terms else None,
            records=self.correction is not None and self.correction.records,
        )

    def end(self, turn: ClientTurn, trained: Trained) -> Answer:
        """Make the client's message of what it has trained, and remember what stays with it, where the server will
        take it: values that are finite, and none that is absurd."""
        if isinstance(trained, Exception):
            return trained
        (result, adapter), client, method = trained, turn.client, self.method
        extra = None if self.correction is None else self.correction.payload(client, result.mean_gradient)
        extra_count = 0 if extra is None else extra.numel()
        if not all(is_sound(each) for each in (adapter, result.mean_gradient) if each is not None):
            return FromClient(result, None, method.payload(client, adapter).numel(), None, extra_count)
        method.keep(client, turn.start, adapter)
        count = method.payload(client, adapter).numel()  # of which the client may have pruned some
        pick = partial(method.payload, client)
        message = self.wire.up(client, adapter, turn.start, pick, error_feedback=method.supports_error_feedback)
        if self.correction is None or extra is None:
            return FromClient(result, message, count)
        self.correction.keep(client, result.mean_gradient)
        encoded = self.wire.up(client, extra, torch.zeros_like(extra), name="correction")
        return FromClient(result, message, count, encoded, extra_count)


def exchange_here(
    side: ClientSide, train: TrainClients, next_batches: Callable[[], Iterable], messages: Iterator[ToClient]
) -> Iterator[tuple[ToClient, Answer]]:
    """Carry messages to clients that are trained in this process; yields them with what came back.

    Args:
        side: the clients'. train: trains them. next_batches: () -> those of the next client.
    """
    asked: dict[int, ToClient] = {}

    def turns() -> Iterator[ClientTurn]:
        for message in messages:
            asked[message.client] = message
            yield side.begin(message, next_batches())

    for turn, trained in train(turns()):
        yield asked.pop(turn.client), side.end(turn, trained)
