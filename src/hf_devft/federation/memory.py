"""What outlives a round: with each client, which never sends it, and with the server."""

from collections.abc import Callable
from typing import Any

from hf_devft.models.layout import State


SERVER = "server"
Owner = int | str


class Memory:
    """Named tensors of the server and of the clients (by number), on the CPU.

    What is put in counts from `commit` on, so that a round that is tried again leaves nothing behind. Tensors have
    PEFT keys where they belong to a layer: a stage change carries them from depth to depth like an adapter's.
    """

    def __init__(self):
        self._kept: dict[tuple[Owner, str], State] = {}
        self._new: dict[tuple[Owner, str], State] = {}

    def get(self, owner: Owner, name: str) -> State | None:
        """What was committed, or None."""
        return self._kept.get((owner, name))

    def put(self, owner: Owner, name: str, state: State) -> None:
        """Keep a copy of some tensors under a name, from the next `commit` on."""
        self._new[owner, name] = {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}

    def rollback(self) -> None:
        """Drop what was put in since the last `commit`."""
        self._new = {}

    def commit(self, gather: Callable[[Any], list] | None = None) -> None:
        """Take in what was put in.

        Args:
            gather: (object) -> those of all processes, where each has trained clients of its own.
        """
        self._kept |= self._new
        if gather:  # the server's are the same everywhere
            for theirs in gather({place: state for place, state in self._new.items() if place[0] != SERVER}):
                self._kept |= theirs
        self._new = {}

    def forget(self, owner: Owner, name: str) -> None:
        """Drop it, where it is there."""
        self._kept.pop((owner, name), None)

    def carry(self, change: Callable[[str, State], State]) -> None:
        """Apply `change`, (name, tensors) -> tensors, to all that is kept, as at a stage change."""
        self._kept = {place: change(place[1], state) for place, state in self._kept.items()}

    def state_dict(self) -> State:
        """{"owner/name/key": tensor}."""
        return {
            f"{owner}/{name}/{key}": tensor
            for (owner, name), state in self._kept.items()
            for key, tensor in state.items()
        }

    def load_state_dict(self, state: State) -> None:
        self._kept, self._new = {}, {}
        for path, tensor in state.items():
            owner, name, key = path.split("/", 2)
            self._kept.setdefault((owner if owner == SERVER else int(owner), name), {})[key] = tensor
