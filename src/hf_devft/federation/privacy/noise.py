"""Gaussian noise that nobody can draw again who does not know the run's secret."""

import hashlib

import numpy as np
import torch


def gaussian(count: int, secret: int, *covers: object) -> torch.Tensor:
    """Draw standard normal values, in float64.

    Args:
        covers: what they are for, down to the very values that they are added to (tensors count by their bytes):
            another sum gets another noise, so that it cannot be taken away from the difference of two.
    """
    digest = hashlib.sha256(f"{secret}".encode())
    for part in covers:
        digest.update(b"\0")
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    rng = np.random.default_rng(int.from_bytes(digest.digest(), "big"))  # all 256 bits; torch takes 32 on a CPU
    return torch.from_numpy(rng.standard_normal(count))
