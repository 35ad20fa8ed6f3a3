"""Clients that can hold only some of the model's layers."""

from collections.abc import Sequence


# What a client does in stages that it cannot hold: nothing, or train the last submodel that it can.
BEYOND_CAPACITY = ("sit_out", "keep_last")


class Capacities:
    """What clients can hold.

    Args:
        num_clients: how many there are.
        max_layers: most layers that a client can train, for the clients in turns; None for no limit.
        stage_layers: layers of each stage.
        beyond: a name in `BEYOND_CAPACITY`.
    """

    def __init__(self, num_clients: int, max_layers: Sequence[int] | None, stage_layers: Sequence[int], beyond: str):
        self._num_clients, self._max_layers = num_clients, max_layers
        self._stage_layers, self._keeps_last = stage_layers, beyond == "keep_last"

    def trains(self, client: int, stage: int) -> int | None:
        """The stage, from 1, whose submodel a client trains in `stage`: this, an earlier one, or none."""
        if self._max_layers is None:
            return stage
        most = self._max_layers[client % len(self._max_layers)]
        if most >= self._stage_layers[stage - 1]:
            return stage
        earlier = range(stage - 1, 0, -1) if self._keeps_last else ()
        return next((one for one in earlier if most >= self._stage_layers[one - 1]), None)

    def taking_part(self, stage: int) -> dict[int, int]:
        """{client that can take part in a stage: the stage whose submodel it trains}."""
        found = ((client, self.trains(client, stage)) for client in range(self._num_clients))
        return {client: one for client, one in found if one is not None}

    def lower(self, client: int, most: int, needed: int) -> None:
        """Count on a client for no more than `most` layers from here on, unless a stage would then have fewer than
        `needed` clients."""
        before, known = self._max_layers, self._max_layers or self._stage_layers[-1:]
        if known[client % len(known)] <= most:
            return
        limits = [known[each % len(known)] for each in range(self._num_clients)]
        limits[client] = most
        self._max_layers = limits
        if any(len(self.taking_part(stage + 1)) < needed for stage in range(len(self._stage_layers))):
            self._max_layers = before
