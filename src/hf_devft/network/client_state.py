"""What stays with a client, on its own disk: values of the adapter, control variates, what messages left out."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hf_devft.configuration import StageConfig
from hf_devft.federation.memory import SERVER, Memory
from hf_devft.files import FLOATS, forget_checksum, read_tensors, write_tensors
from hf_devft.models.layout import State
from hf_devft.stages.global_adapter import GlobalAdapter


_STAGE = "stage"  # under which a file says at which stage's depth its tensors are


class ClientState:
    """The memory of a client, as it was after each of its last turns.

    The server says after which turn its update has counted last, so that a round that was tried again, or a server
    that goes on from an earlier checkpoint, finds the state that belongs to it.

    Args:
        folder: where it is kept. keep: of how many turns.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder, keep

    def load(self, round_index: int) -> tuple[State, int]:
        """Read the state after the turn of a round, and the stage whose depth it has; nothing for round -1.

        Raises:
            ValueError: it is not there any more, or broken.
        """
        if round_index < 0:
            return {}, 0
        path = self._path(round_index)
        try:
            state = read_tensors(path, (*FLOATS, "I64"), largest=torch.finfo(torch.float32).max)
            return state, int(state.pop(_STAGE))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"what this client has kept of round {round_index + 1} cannot be read from {path}: {error}. Only a "
                "new run can start without it."
            ) from error

    def save(self, round_index: int, state: State, stage: int, needed: Iterable[int] = ()) -> None:
        """Write the state after the turn of a round, in one move, and delete the oldest ones.

        Args:
            stage: whose depth it has. needed: rounds whose state the server may still ask for.
        """
        write_tensors(self._path(round_index), state | {_STAGE: torch.tensor(stage)})
        paths = sorted(self._folder.glob("round-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        stays = {*map(self._path, needed), self._path(round_index)}  # clocks jump
        for old in paths[: -self._keep]:
            if old not in stays:
                forget_checksum(old)
                old.unlink()

    def _path(self, round_index: int) -> Path:
        return self._folder / f"round-{round_index + 1}.safetensors"


def carry(memory: Memory, adapter: GlobalAdapter, records: Sequence[StageConfig], stage: int) -> None:
    """Take what a client remembers from the depth of a stage to that of the last of `records`, through those between,
    as the server does with what it remembers.

    Args:
        adapter: a full-depth one; only its tensors' names and shapes count.
        records: of the stages from the first on. stage: whose depth it has.
    """
    for before, after in zip(records[stage - 1 :], records[stage:], strict=False):
        memory.carry(
            lambda name, state, record=before: adapter.expand_partial_state(
                state, record.groups or [], record.transfer, is_adapter=False
            )
        )
        memory.carry(lambda name, state, rule=after.adapter_rule: replace(adapter, state=state).fuse(*rule))
    memory.forget(SERVER, "initial")
