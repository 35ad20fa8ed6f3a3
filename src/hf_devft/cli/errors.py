"""Errors of one line; nothing here waits for torch."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hf_devft.cli.rank import rank


GO_ON = "add `--resume_from_checkpoint last` to go on"

# What is wrong is in their message.
_SAY_IT_ALL = (ValueError, ImportError, FileNotFoundError)


@contextmanager
def one_line_errors(traceback: bool | None = None) -> Iterator[None]:
    """Within this context, what is wrong with a config, with data, files or the machine ends the process in one line.

    Args:
        traceback: whether to show where it comes from instead; None where the command has no flag to ask for that.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if traceback:
            raise
        if rank() == 0:
            said = "stopped." if traceback is None else str(interrupt) or f"stopped: {GO_ON}."
            below_ctrl_c = "\n" if sys.stderr.isatty() else ""
            print(f"{below_ctrl_c}{said}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if traceback:
            raise
        who = "error" if rank() == 0 else f"error on process {rank()}"
        needs_trace = traceback is not None and not isinstance(error, _SAY_IT_ALL)
        where = " (`--traceback` shows where)" if needs_trace else ""
        sys.exit(f"{who}: {' '.join(str(error).split()) or type(error).__name__}{where}")
