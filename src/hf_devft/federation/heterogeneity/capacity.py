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
        limits = max_layers or stage_layers[-1:]
        self._limits = [limits[client % len(limits)] for client in range(num_clients)]
        self._stage_layers, self._keeps_last = stage_layers, beyond == "keep_last"

    def trains(self, client: int, stage: int) -> int | None:
        """The stage, from 1, whose submodel a client trains in `stage`: this, an earlier one, or none."""
        most = self._limits[client]
        if most >= self._stage_layers[stage - 1]:
            return stage
        earlier = range(stage - 1, 0, -1) if self._keeps_last else ()
        return next((one for one in earlier if most >= self._stage_layers[one - 1]), None)

    def taking_part(self, stage: int) -> dict[int, int]:
        """{client that can take part in a stage: the stage whose submodel it trains}."""
        found = ((client, self.trains(client, stage)) for client in range(len(self._limits)))
        return {client: one for client, one in found if one is not None}

    def lower(self, client: int, most: int, needed: int) -> None:
        """Count on a client for no more than `most` layers from here on, unless a stage would then have fewer than
        `needed` clients."""
        before, self._limits[client] = self._limits[client], min(self._limits[client], most)
        if any(len(self.taking_part(stage + 1)) < needed for stage in range(len(self._stage_layers))):
            self._limits[client] = before
