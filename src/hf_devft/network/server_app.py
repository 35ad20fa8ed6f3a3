"""The server of a federation, as Flower starts it: `DevFTTrainer` with its clients on other machines."""

import json
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_devft.cli.arguments import RecipeArguments, parse_arguments
from hf_devft.cli.recipe import load_server_data, make_trainer
from hf_devft.cli.summary import closing
from hf_devft.configuration import DevFTConfig, Setup, check_compatibility
from hf_devft.network.attendance import some_of
from hf_devft.network.names import read_public_keys
from hf_devft.network.parts import pull_replies_soon
from hf_devft.network.remote_clients import RemoteClients
from hf_devft.network.settings import check_model_options, shared_settings
from hf_devft.run.claim import check_free
from hf_devft.run.report import table_rows
from hf_devft.run.tables import GrowingTable
from hf_devft.trainer.mixin import DevFTMixin


app = ServerApp()
TRAFFIC_NAME = "traffic.json"
logger = logging.getLogger("hf_devft")


def check_before_waiting(recipe: RecipeArguments, args: DevFTConfig, names: list[str], count: int | None) -> None:
    """Refuse what no client could change, before any is waited for.

    Raises:
        ValueError: clients that cannot be counted, or what `check_model_options` and `check_run` refuse.
    """
    if not count:
        raise ValueError("how many clients there are is not known: give `num_clients`, or their names as `clients`.")
    if names and (count > len(names) or len(set(names)) < len(names)):
        raise ValueError(
            f"clients={names}, min-clients={count}: give each name once, and wait for no more than those."
        )
    check_model_options(args.model_init_kwargs or {})
    check_run(recipe, args)


def check_run(recipe: RecipeArguments, args: DevFTConfig) -> None:
    """Refuse a run that no network can have, or whose folder has another one's results.

    Raises:
        ValueError: says why.
    """
    check_compatibility(Setup(args, trainer=recipe.trainer, network=True))
    check_free(args)


class RoundLog(TrainerCallback):
    """A line for each round, as Flower's log has no progress bar.

    Args:
        trainer: whose rounds they are.

    Attributes:
        rounds: how many there were since this server's start.
    """

    def __init__(self, trainer: DevFTMixin):
        self._trainer = trainer
        self.rounds = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.rounds += 1
        record, stages = self._trainer.ledger.rounds[-1], self._trainer.stages
        answered = some_of([client for client in record.clients if client not in record.dropped])
        came_to = f"loss {record.loss:.3f} of {answered}" if record.epsilon is None else f"ε {record.epsilon:.2f}"
        logger.info(
            f"round {record.round}/{state.max_steps}, stage {record.stage}/{len(stages)} "
            f"({stages[record.stage - 1].num_layers} layers): {came_to}, {record.seconds:.1f} s"
        )


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says.

    Its keys: `config`, a YAML file's path, or a packaged one's name, as for `recipes/devft.py`; `overrides`, flags as
    there; `clients`, the names of all clients, where they are known; `min-clients`, how many the run waits for
    (default: `num_clients`, or all of `clients`); `timeout`, seconds that a turn may take; `keys`, a folder of the
    clients' public keys, `NAME.key.pub`, with which each must have signed its name (default: none has to).

    Raises:
        ValueError: a config, data or options that cannot be trained over a network.
    """
    log_openly()
    pull_replies_soon()
    asked = context.run_config
    recipe, args = asked_run(asked)
    names = str(asked["clients"]).split()
    count = int(asked["min-clients"]) or len(names) or args.num_clients
    check_before_waiting(recipe, args, names, count)
    keys = read_public_keys(Path(str(asked["keys"])), names) if asked["keys"] else None
    clients = RemoteClients(grid, timeout=float(asked["timeout"]) or None, keys=keys)
    data = load_server_data(recipe, args)
    who = clients.wait_for(count, names, shared_settings(args, recipe.lora_config(args.task)))
    args.num_clients = len(who.names)
    args.client_max_layers = args.client_max_layers or clients.max_layers
    train(recipe, args, clients, (who, *data))


def asked_run(run_config: Mapping[str, Any]) -> tuple[RecipeArguments, DevFTConfig]:
    """Read the run that a run config asks for."""
    return parse_arguments(["--config", str(run_config["config"]), *shlex.split(str(run_config["overrides"]))])


def log_openly() -> None:
    """Say what happens as lines of a log, which Flower passes on; bars would be many lines there."""
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def train(recipe: RecipeArguments, args: DevFTConfig, clients: RemoteClients, data: tuple) -> None:
    """Train, with a line for each round, and the table at the end.

    Args:
        data: see `make_trainer`.
    """
    args.disable_tqdm = True
    trainer = make_trainer(recipe, args, clients, data)
    trainer.add_callback(log := RoundLog(trainer))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    traffic = {"rounds": log.rounds, "bytes_down": clients.traffic.down, "bytes_up": clients.traffic.up}
    Path(args.output_dir, TRAFFIC_NAME).write_text(json.dumps(traffic) + "\n")
    finished = [stage for stage in trainer.stages if stage.rounds_done]  # a run may end before its last stage
    GrowingTable().show(table_rows(finished, trainer.run.start_metrics))
    print(closing(trainer))
