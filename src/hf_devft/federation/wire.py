"""What travels: the values of a message, encoded in fewer bytes."""

import math
from collections.abc import Callable

import torch

from hf_devft.federation.encoding import BITS, BLOCK, INDEX_BYTES, Encoded, encode, from_bytes
from hf_devft.federation.memory import Memory
from hf_devft.models.layout import AdapterLayout


WIRE_DTYPES = tuple(BITS)


def is_lossy(dtype: str, upload_fraction: float) -> bool:
    """Whether messages say less than the values that they stand for."""
    return dtype != "fp32" or upload_fraction < 1


class Wire:
    """Encodes messages, and says how many bytes they take.

    Downwards the values are encoded. Upwards what a client has changed is encoded, after what its last messages left
    out has been added (error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847), which stays with
    the client.

    Args:
        dtype: of the values, "fp32", "bf16", "int8" or "int4"; the integers blockwise, with a bf16 scale per `BLOCK`.
        upload_fraction: upwards, the part of the values that is sent, the largest ones, each with a 32-bit index
            (Stich et al. 2018, arXiv 1809.07599); 1 sends all.
        memory: keeps what was left out.
    """

    def __init__(self, dtype: str, upload_fraction: float, memory: Memory):
        self.dtype, self.upload_fraction, self.memory = dtype, upload_fraction, memory

    def begin_stage(self, layout: AdapterLayout) -> None:
        """Begin a stage, with adapters of this layout."""
        self.layout = layout

    def down(self, values: torch.Tensor) -> Encoded:
        """Encode a message to a client."""
        return encode(values, self.dtype)

    def up(
        self,
        client: int,
        vector: torch.Tensor,
        known: torch.Tensor,
        pick: Callable[[torch.Tensor], torch.Tensor] = lambda vector: vector,
        error_feedback: bool = True,
        name: str = "adapter",
    ) -> Encoded:
        """Encode a client's message, `pick(vector)`, as a change of `pick(known)`, which both ends know. Remembers
        with the client what is left out.

        Args:
            vector, known: of an adapter's layout: what the client has, and what it started from.
            pick: takes the message's values out of such a vector.
            error_feedback: whether to add what its last messages left out, and to remember what this one leaves out.
            name: which of a client's messages it is.
        """
        values = pick(vector)
        if not is_lossy(self.dtype, self.upload_fraction):
            return Encoded(values, values.numel())
        change = values - pick(known)
        if not error_feedback:
            return self._change(change)
        where = pick(torch.arange(vector.numel(), device=vector.device))
        state = self.memory.get(client, f"left-out-{name}")
        left_out = self.layout.flat(state) if state else torch.zeros(sum(self.layout.sizes))
        left_out = left_out.to(values.device)
        change = change + left_out[where]
        sent = self._change(change)
        left_out[where] = change - sent.decoded
        self.memory.put(client, f"left-out-{name}", self.layout.state(left_out))
        return sent

    def bytes_down(self, count: int) -> int:
        """Count the bytes of `count` values, as they are sent to a client."""
        bits, scale = BITS[self.dtype]
        return math.ceil((count * bits + math.ceil(count / BLOCK) * scale) / 8)

    def bytes_up(self, count: int) -> int:
        """Count the bytes of `count` values, as a client sends them."""
        sent = self._count(count)
        return self.bytes_down(sent) + (INDEX_BYTES * sent if self.upload_fraction < 1 else 0)

    def parse_down(self, data: bytes, count: int) -> Encoded:
        """Read a message of `count` values to a client from its bytes; see `encoding.to_bytes`.

        Raises:
            ValueError: it has another length.
        """
        return from_bytes(data, self.dtype, count)

    def parse_up(self, data: bytes, count: int) -> Encoded:
        """Read a client's message of `count` values from its bytes.

        Raises:
            ValueError: it has another length, or says values that there are not.
        """
        is_change = is_lossy(self.dtype, self.upload_fraction)
        chosen = self._count(count) if self.upload_fraction < 1 else None
        return from_bytes(data, self.dtype, count, chosen, is_change)

    def _count(self, count: int) -> int:
        return min(count, math.ceil(count * self.upload_fraction))

    def _change(self, change: torch.Tensor) -> Encoded:
        """Encode the largest values of a change."""
        if self.upload_fraction == 1:
            return encode(change, self.dtype, is_change=True)
        chosen = change.abs().topk(self._count(change.numel())).indices.sort().values
        return encode(change, self.dtype, chosen, is_change=True)
