"""`devft train`, and recipes/devft.py: help at once, or a run, for which the libraries are imported."""

import sys
from collections.abc import Sequence

from rich.console import Console

from hf_devft.cli.configs import take_config
from hf_devft.cli.errors import one_line_errors
from hf_devft.cli.help import short_help
from hf_devft.cli.rank import rank
from hf_devft.cli.threads import sleep_when_idle


def main(argv: Sequence[str], command: str = "train") -> None:
    """Show the help of a command where it is asked for; else see `train_or_plan`."""
    if {"-h", "--help"} & set(argv):
        print(short_help(command))
        return
    with one_line_errors("--traceback" in argv):
        take_config(argv)
    sleep_when_idle()
    console = Console(stderr=True, quiet=rank() > 0 or not sys.stderr.isatty())
    with console.status("loading PyTorch and Transformers"):  # some seconds
        from hf_devft.cli.training import train_or_plan

    train_or_plan(argv)
