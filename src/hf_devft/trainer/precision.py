"""Half precision on a CPU, which may only emulate it."""

import logging
from collections.abc import Mapping
from typing import Any

import torch


logger = logging.getLogger(__name__)

# As `mixed_precision` and the names of CPUs' instructions have them.
HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def advise_float32(mixed_precision: str, dtype: torch.dtype) -> None:
    """Say what makes a run slow on a CPU that emulates half precision."""
    capabilities = cpu()
    slow = [kind for name, kind in HALF_PRECISIONS.items() if emulates(name, capabilities)]
    advice = {
        f"set {mixed_precision} to false": HALF_PRECISIONS.get(mixed_precision),
        """load the base in float32 (`--model_init_kwargs '{"dtype": "float32"}'`)""": dtype,
    }
    if said := {what: kind for what, kind in advice.items() if kind in slow}:
        names = sorted({str(kind).removeprefix("torch.") for kind in said.values()})
        logger.warning(
            f"this CPU has no instructions for {' or '.join(names)}, in which it is many times slower than in "
            f"float32: {' and '.join(said)}."
        )


def cpu() -> Mapping[str, Any]:
    """Return what the CPU has; nothing where torch is too old to know."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def emulates(precision: str, capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU of these `torch.cpu.get_capabilities()` is an x86 one that multiplies no matrices in this of
    `HALF_PRECISIONS`."""
    known = capabilities.get
    return known("architecture") == "x86_64" and not (known(f"avx512_{precision}") or known(f"amx_{precision}"))
