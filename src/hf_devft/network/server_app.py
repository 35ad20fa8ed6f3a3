"""The server of a federation, as Flower starts it: `DevFTTrainer` with its clients on other machines."""

import json
import logging
import shlex
from pathlib import Path

import datasets
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_devft.cli.arguments import RecipeArguments, parse_arguments
from hf_devft.cli.recipe import make_trainer
from hf_devft.cli.summary import closing
from hf_devft.configuration import DevFTConfig, Setup, check_compatibility
from hf_devft.network.names import read_public_keys
from hf_devft.network.remote_clients import RemoteClients
from hf_devft.network.settings import shared_settings
from hf_devft.run.report import table_rows
from hf_devft.run.tables import GrowingTable
from hf_devft.trainer.mixin import DevFTMixin


app = ServerApp()
TRAFFIC_NAME = "traffic.json"
logger = logging.getLogger("hf_devft")


def check_before_waiting(recipe: RecipeArguments, args: DevFTConfig, names: list[str], count: int | None) -> None:
    """Refuse what no client could change, before any is waited for.

    Raises:
        ValueError: clients that cannot be counted, or a run that no network can have.
    """
    if not count:
        raise ValueError("how many clients there are is not known: give `num_clients`, or their names as `clients`.")
    if names and (count > len(names) or len(set(names)) < len(names)):
        raise ValueError(
            f"clients={names}, min-clients={count}: give each name once, and wait for no more than those."
        )
    check_compatibility(Setup(args, trainer=recipe.trainer, network=True))


class RoundLog(TrainerCallback):
    """A line for each round, as Flower's log has no progress bar.

    Args:
        trainer: whose rounds they are.
    """

    def __init__(self, trainer: DevFTMixin):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        record, stages = self._trainer.ledger.rounds[-1], self._trainer.stages
        answered = ", ".join(client for client in record.clients if client not in record.dropped)
        came_to = f"ε {record.epsilon:.2f}" if record.loss is None else f"loss {record.loss:.3f} of {answered}"
        logger.info(
            f"round {record.round}/{state.max_steps}, stage {record.stage}/{len(stages)} "
            f"({stages[record.stage - 1].num_layers} layers): {came_to}, {record.seconds:.1f} s"
        )


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says.

    Its keys: `config`, the path of a YAML file as for `recipes/devft.py`; `overrides`, flags as there; `clients`, the
    names of all clients, where they are known; `min-clients`, how many the run waits for (default: `num_clients`, or
    all of `clients`); `timeout`, seconds that a turn may take; `keys`, a folder of the clients' public keys,
    `NAME.key.pub`, with which each must have signed its name (default: none has to).

    Raises:
        ValueError: a config, data or options that cannot be trained over a network.
    """
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    asked = context.run_config
    config = Path(str(asked["config"]))
    recipe, args = parse_arguments(shlex.split(str(asked["overrides"])), config)
    names = str(asked["clients"]).split()
    count = int(asked["min-clients"]) or len(names) or args.num_clients
    check_before_waiting(recipe, args, names, count)
    keys = read_public_keys(Path(str(asked["keys"])), names) if asked["keys"] else None
    clients = RemoteClients(grid, timeout=float(asked["timeout"]) or None, keys=keys)
    who = clients.wait_for(count, names, shared_settings(args, recipe.lora_config()))
    args.num_clients, args.disable_tqdm = len(who.names), True
    args.client_max_layers = args.client_max_layers or clients.max_layers
    trainer = make_trainer(recipe, args, clients, who)
    trainer.add_callback(RoundLog(trainer))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    traffic = {"bytes_down": clients.traffic.down, "bytes_up": clients.traffic.up}
    Path(args.output_dir, TRAFFIC_NAME).write_text(json.dumps(traffic) + "\n")
    GrowingTable().show(table_rows(trainer.stages, trainer.run.start_metrics))
    print(closing(trainer))
