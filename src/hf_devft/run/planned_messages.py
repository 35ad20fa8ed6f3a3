"""The messages that a run's rounds will send, by its config alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_devft.configuration import DevFTConfig
from hf_devft.federation.memory import Memory
from hf_devft.federation.methods import Clients, make_methods
from hf_devft.federation.sampling import sample_clients
from hf_devft.federation.wire import Wire
from hf_devft.models.layout import AdapterLayout


@dataclass(frozen=True)
class PlannedMessages:
    """Of some clients' turns: bytes to them, and from them where all answer, the values that one of them trains at
    most, and the layers that each leaves out."""

    down: float
    up: float
    trained: int
    skips: list[tuple[int, ...]]


def planned_traffic(args: DevFTConfig, layout: AdapterLayout, num_clients: int, rounds: range) -> float:
    """Bytes that rounds with an adapter of this layout will send, both ways, of all clients; see `plan_run`."""
    messages = planned_messages(args, layout, num_clients, planned_turns(args, range(num_clients), rounds))
    return messages.down + (1 - args.client_dropout_rate) * messages.up


def planned_turns(args: DevFTConfig, everyone: range, rounds: range) -> list[tuple[int, int]]:
    """(round, client) of the clients that these rounds sample."""
    return [
        (index, client)
        for index in rounds
        for client in sample_clients(everyone, args.clients_per_round, args.seed, index)
    ]


def planned_messages(
    args: DevFTConfig, layout: AdapterLayout, num_clients: int, turns: Sequence[tuple[int, int]]
) -> PlannedMessages:
    """Count the messages of turns, (round, client), of so many clients."""
    memory = Memory()
    method, correction, *_ = make_methods(args.federated_method, args.federated_method_kwargs)
    labels = np.ones((num_clients, 2))  # of which the messages' sizes do not depend
    method.begin_run(Clients(examples=[1] * num_clients, seed=args.seed, memory=memory, label_counts=lambda: labels))
    method.begin_stage(layout, torch.zeros(sum(layout.sizes)))
    wire = Wire(args.wire_dtype, args.upload_fraction, memory)
    both = 2 if correction is not None and correction.records else 1
    down, up, trained, skips = 0, 0, 0, []
    for method.round_index, client in turns:
        to, back = method.message_sizes(client)
        down += both * wire.bytes_down(to)
        up += both * wire.bytes_up(back)
        trained = max(trained, layout.count(method.trains(client)))
        skips.append(method.skips(client))
    return PlannedMessages(down, up, trained, skips)
