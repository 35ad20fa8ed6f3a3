"""The command `devft`, as `python -m hf_devft`, too. Each of its commands imports what it needs when it is called."""

from typing import Annotated

import typer

from hf_devft import __version__
from hf_devft.cli.threads import sleep_when_idle


# What follows is read by the command itself, which has flags for every key of a config.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="devft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="On several processes: `accelerate launch -m hf_devft train ...`. Paper: https://arxiv.org/abs/2508.00041",
)
federation = typer.Typer(no_args_is_help=True, help="A federation over a network: certificates and nodes.")
app.add_typer(federation, name="federation")


def _say_version(asked: bool) -> None:
    if asked:
        print(f"hf-devft {__version__}")
        raise typer.Exit


@app.callback()
def devft(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Developmental federated tuning: LoRA adapters, by clients who keep their data, on submodels that grow."""
    sleep_when_idle()  # whichever command then loads PyTorch


@app.command(context_settings=_PASSED_ON)
def quickstart(context: typer.Context) -> None:
    """Train the embedded base on made-up tasks of 20 clients, in three stages; some minutes on two cores."""
    _train(["--config", "quickstart", *context.args], "quickstart")


@app.command(context_settings=_PASSED_ON)
def train(context: typer.Context) -> None:
    """Train by a config, or on your own files: `devft train --train_file a.jsonl b.jsonl`."""
    _train(context.args or ["--help"])


@app.command(context_settings=_PASSED_ON)
def plan(context: typer.Context) -> None:
    """Say what a run will send, compute and hold in memory, without any weights; flags as of `devft train`."""
    _train([*context.args, "--plan"], "plan")


@app.command(context_settings=_PASSED_ON)
def evaluate(context: typer.Context) -> None:
    """Run public benchmarks of a stage: `devft evaluate --run outputs/quickstart --stage 3 --tasks mmlu`."""
    from hf_devft.cli.evaluate import main as run

    run(context.args)


@app.command()
def push(
    run: Annotated[str, typer.Argument(help="Output folder of a run.")],
    repository: Annotated[str, typer.Argument(help="On the Hub, such as me/llama-devft.")],
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    private: Annotated[bool | None, typer.Option("--private", help="Make a new repository private.")] = None,
) -> None:
    """Push the stages of a run that the Hub does not hold yet."""
    from hf_devft.cli.errors import one_line_errors
    from hf_devft.hub.push import push_run

    with one_line_errors():
        push_run(run, repository, revision, private)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Output folders; the first is what the others are compared with.")],
    plot: Annotated[str, typer.Option(help="Where to save the curves.")] = "compare.png",
) -> None:
    """Compare runs until the same loss: a table, and a plot of loss against megabytes."""
    from hf_devft.cli.compare import main as run
    from hf_devft.cli.errors import one_line_errors

    with one_line_errors():
        run(runs, plot)


@federation.command(context_settings=_PASSED_ON)
def certificates(context: typer.Context) -> None:
    """Make a certificate authority, a server's certificate, and keys of nodes."""
    from hf_devft.network.certificates import main as run

    run(context.args)


@federation.command(context_settings=_PASSED_ON)
def node(context: typer.Context) -> None:
    """Take part with one's own rows, on this machine."""
    from hf_devft.network.node import main as run

    run(context.args)


def _train(arguments: list[str], command: str = "train") -> None:
    from hf_devft.cli.train import main as run

    run(arguments, command)


def main() -> None:
    """Run the command line."""
    app(prog_name="devft")


if __name__ == "__main__":
    main()
