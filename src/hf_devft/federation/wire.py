"""What travels: the values of a message, encoded in fewer bytes."""

import math
from collections.abc import Callable

import torch

from hf_devft.federation.memory import Memory
from hf_devft.models.layout import AdapterLayout


# Bits of a value, and of the scale that a block of values shares.
BITS = {"fp32": (32, 0), "bf16": (16, 0), "int8": (8, 16), "int4": (4, 16)}
WIRE_DTYPES = tuple(BITS)
BLOCK = 64
_INDEX_BYTES = 4


def quantize(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantise `values` to integers, symmetrically and blockwise, and back.

    Each block of `BLOCK` values has a scale, its largest magnitude over 2^(bits-1) − 1, in half-precision range
    (bf16), rounded up so that nothing is clipped (Dettmers et al. 2022, arXiv 2110.02861, §2.1, with linear levels:
    our choice).
    """
    top = 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(values.float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = (padded.abs().amax(dim=1, keepdim=True) / top * (1 + 2**-8)).bfloat16().float()
    levels = (padded / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-top, top)
    return (levels * scales).flatten()[: values.numel()].to(values.dtype)


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

    def down(self, values: torch.Tensor) -> torch.Tensor:
        """Encode a message to a client; returns what it decodes."""
        return self._rounded(values)

    def up(
        self,
        client: int,
        vector: torch.Tensor,
        known: torch.Tensor,
        pick: Callable[[torch.Tensor], torch.Tensor] = lambda vector: vector,
        error_feedback: bool = True,
        name: str = "adapter",
    ) -> torch.Tensor:
        """Encode a client's message, `pick(vector)`, as a change of `pick(known)`, which both ends know; returns what
        the server decodes. Remembers with the client what is left out.

        Args:
            vector, known: of an adapter's layout: what the client has, and what it started from.
            pick: takes the message's values out of such a vector.
            error_feedback: whether to add what its last messages left out, and to remember what this one leaves out.
            name: which of a client's messages it is.
        """
        values = pick(vector)
        if self.dtype == "fp32" and self.upload_fraction == 1:
            return values
        known = pick(known)
        if not error_feedback:
            return known + self._encoded(values - known)
        where = pick(torch.arange(vector.numel(), device=vector.device))
        state = self.memory.get(client, f"left-out-{name}")
        left_out = self.layout.flat(state) if state else torch.zeros(sum(self.layout.sizes))
        left_out = left_out.to(values.device)
        change = values - known + left_out[where]
        sent = self._encoded(change)
        left_out[where] = change - sent
        self.memory.put(client, f"left-out-{name}", self.layout.state(left_out))
        return known + sent

    def bytes_down(self, count: int) -> int:
        """Count the bytes of `count` values, as they are sent to a client."""
        bits, scale = BITS[self.dtype]
        return math.ceil((count * bits + math.ceil(count / BLOCK) * scale) / 8)

    def bytes_up(self, count: int) -> int:
        """Count the bytes of `count` values, as a client sends them."""
        sent = self._count(count)
        return self.bytes_down(sent) + (_INDEX_BYTES * sent if self.upload_fraction < 1 else 0)

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        if self.dtype == "fp32":
            return values
        if self.dtype == "bf16":
            return values.bfloat16().to(values.dtype)
        return quantize(values, BITS[self.dtype][0])

    def _count(self, count: int) -> int:
        return min(count, math.ceil(count * self.upload_fraction))

    def _encoded(self, change: torch.Tensor) -> torch.Tensor:
        """The largest values, rounded; the others 0."""
        if self.upload_fraction == 1:
            return self._rounded(change)
        chosen = change.abs().topk(self._count(change.numel())).indices.sort().values
        return torch.zeros_like(change).index_copy(0, chosen, self._rounded(change[chosen]))
