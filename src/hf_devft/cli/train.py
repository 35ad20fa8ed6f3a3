"""`devft train`, and recipes/devft.py: help at once, or a run, for which the libraries are imported."""

from collections.abc import Sequence

from hf_devft.cli.help import short_help


def main(argv: Sequence[str]) -> None:
    """Show the help where it is asked for; else see `train_or_plan`."""
    if {"-h", "--help"} & set(argv):
        print(short_help())
        return
    from hf_devft.cli.training import train_or_plan

    train_or_plan(argv)
