"""Idle threads of OpenMP, in which PyTorch computes on a CPU."""

import os


# Some microseconds; libgomp's own number, 300,000, takes milliseconds. Without any, small layers take a third longer
# on idle cores; with 3,000, more than twice as long on cores that are not (our measurements).
_SPINS = "300"


def sleep_when_idle() -> None:
    """Have threads that wait for the others sleep soon, unless the environment says how they wait; before PyTorch is
    loaded, which reads it once.

    Where other work shares the cores, threads that spin for long keep those from running that they wait for, and
    rounds of the quickstart's base take many times as long (docs/troubleshooting.md).
    """
    if os.environ.keys().isdisjoint(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
