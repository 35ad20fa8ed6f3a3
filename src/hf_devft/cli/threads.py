"""Idle threads of OpenMP, in which PyTorch computes on a CPU."""

import os


# A few tens of microseconds; libgomp's own number, 300,000, takes milliseconds.
_SPINS = "10000"


def sleep_when_idle() -> None:
    """Have threads that wait for the others sleep soon, unless the environment says how they wait; before PyTorch is
    loaded, which reads it once.

    Where other work shares the cores, threads that spin for long keep those from running that they wait for: on two
    cores with two more jobs, rounds of the quickstart's base take a fifth or less of the time; alone, the same (our
    measurement, docs/troubleshooting.md).
    """
    if os.environ.keys().isdisjoint(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
