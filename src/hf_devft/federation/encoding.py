"""Values as they travel: encoded in fewer bits, and as bytes."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


# Bits of a value, and of the scale that a block of values shares.
BITS = {"fp32": (32, 0), "bf16": (16, 0), "int8": (8, 16), "int4": (4, 16)}
BLOCK = 64
INDEX_BYTES = 4


@dataclass(frozen=True)
class Encoded:
    """Values as they travel.

    Attributes:
        values: in the wire's type; integers are levels, in blocks of `BLOCK`, the last one filled up with zeros.
        count: how many values they stand for.
        scales: of the blocks of levels, or None.
        indices: which of the `count` values these are, ascending; None for all. The others are 0.
        is_change: whether it is a change of what both ends know.
    """

    values: torch.Tensor
    count: int
    scales: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    is_change: bool = False

    @cached_property
    def decoded(self) -> torch.Tensor:
        """The values, or the change, that the other end gets."""
        sent = self.values
        if self.scales is not None:
            size = self.count if self.indices is None else len(self.indices)
            sent = (sent * self.scales).flatten()[:size]
        if self.indices is not None:
            zeros = torch.zeros(self.count, dtype=torch.float32, device=sent.device)
            return zeros.index_copy(0, self.indices, sent.float())
        return sent.float() if sent.dtype == torch.bfloat16 else sent

    def arrive(self, known: torch.Tensor) -> torch.Tensor:
        """Return the values that the other end gets, which knows `known` of them."""
        return known + self.decoded if self.is_change else self.decoded


def encode(values: torch.Tensor, dtype: str, indices: torch.Tensor | None = None, is_change: bool = False) -> Encoded:
    """Encode values, or those at `indices`.

    Integers are levels, symmetrical and blockwise: each block of `BLOCK` values has a scale, its largest magnitude
    over 2^(bits-1) − 1, in half-precision range (bf16), rounded up so that nothing is clipped (Dettmers et al. 2022,
    arXiv 2110.02861, §2.1, with linear levels: our choice).
    """
    count, scales = values.numel(), None
    sent = values if indices is None else values[indices]
    if dtype == "bf16":
        sent = sent.bfloat16()
    elif dtype != "fp32":
        top = 2 ** (BITS[dtype][0] - 1) - 1
        padded = torch.nn.functional.pad(sent.float(), (0, -sent.numel() % BLOCK)).view(-1, BLOCK)
        scales = (padded.abs().amax(dim=1, keepdim=True) / top * (1 + 2**-8)).bfloat16().float()
        sent = (padded / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-top, top)
    return Encoded(sent, count, scales, indices, is_change)


def to_bytes(encoded: Encoded, dtype: str) -> bytes:
    """Write a message as its bytes, as many as `Wire.bytes_down` and `bytes_up` count: values, two levels of four
    bits in a byte, then scales, then indices, all little-endian."""
    parts = [_values_to_bytes(encoded, dtype)]
    if encoded.scales is not None:
        parts.append(_bfloat16_bytes(encoded.scales.flatten()))
    if encoded.indices is not None:
        parts.append(encoded.indices.cpu().numpy().astype("<u4").tobytes())
    return b"".join(parts)


def _values_to_bytes(encoded: Encoded, dtype: str) -> bytes:
    values = encoded.values.detach().cpu()
    if dtype == "fp32":
        return values.numpy().astype("<f4", copy=False).tobytes()
    if dtype == "bf16":
        return _bfloat16_bytes(values)
    size = encoded.count if encoded.indices is None else len(encoded.indices)
    levels = values.flatten()[:size].numpy().astype(np.int8)
    if dtype == "int8":
        return levels.tobytes()
    pairs = np.pad(levels + 8, (0, size % 2)).astype(np.uint8).reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).tobytes()


def _bfloat16_bytes(values: torch.Tensor) -> bytes:
    return values.cpu().bfloat16().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def from_bytes(data: bytes, dtype: str, count: int, chosen: int | None = None, is_change: bool = False) -> Encoded:
    """Read a message from its bytes; see `to_bytes`.

    Args:
        dtype: of the values. count: how many they stand for. chosen: how many of them are sent; None for all.
        is_change: whether they are a change of what both ends know.

    Raises:
        ValueError: the bytes are not of such a message.
    """
    size, (bits, scale_bits) = count if chosen is None else chosen, BITS[dtype]
    blocks = math.ceil(size / BLOCK) if scale_bits else 0
    ends = np.cumsum([math.ceil(size * bits / 8), 2 * blocks, 0 if chosen is None else INDEX_BYTES * size])
    if len(data) != ends[-1]:
        raise ValueError(f"a message of {count} values in {dtype} has {ends[-1]} bytes, this one has {len(data)}.")
    values, scales, indices = None, None, None
    raw = np.frombuffer(data, np.uint8)
    if dtype == "fp32":
        values = torch.from_numpy(raw[: ends[0]].view("<f4").astype(np.float32))
    elif dtype == "bf16":
        values = _bfloat16(raw[: ends[0]])
    else:
        levels = raw[: ends[0]].view(np.int8).astype(np.float32)
        if dtype == "int4":
            pairs = np.stack([raw[: ends[0]] & 15, raw[: ends[0]] >> 4], axis=1).astype(np.float32) - 8
            levels = pairs.flatten()[:size]
        values = torch.from_numpy(np.pad(levels, (0, -size % BLOCK))).view(-1, BLOCK)
        scales = _bfloat16(raw[ends[0] : ends[1]]).float()[:, None]
    if chosen is not None:
        indices = torch.from_numpy(raw[ends[1] :].view("<u4").astype(np.int64))
        if size and not (bool((indices.diff() > 0).all()) and indices[-1] < count):
            raise ValueError(f"a message says values that there are not: give ascending places below {count}.")
    return Encoded(values, count, scales, indices, is_change)


def _bfloat16(raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(raw.view("<i2").astype(np.int16)).view(torch.bfloat16)
