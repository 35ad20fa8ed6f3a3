"""Which of a run's processes this is."""

import os


def rank() -> int:
    """Return this process's number in the run, as its launcher says it."""
    return int(os.environ.get("RANK", "0"))
