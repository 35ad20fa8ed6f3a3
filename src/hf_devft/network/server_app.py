"""The server of a federation, as Flower starts it: `DevFTTrainer` with its clients on other machines."""

import json
import logging
import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from transformers.utils import logging as transformers_logging

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import make_trainer
from hf_devft.network.remote_clients import RemoteClients


app = ServerApp()
TRAFFIC_NAME = "traffic.json"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says.

    Its keys: `config`, the path of a YAML file as for `recipes/devft.py`; `overrides`, flags as there; `clients`, the
    names of all clients, where they are known; `min-clients`, how many the run waits for (default: `num_clients`, or
    all of `clients`); `timeout`, seconds that a turn may take.

    Raises:
        ValueError: a config, data or options that cannot be trained over a network.
    """
    logger = logging.getLogger("hf_devft")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    transformers_logging.disable_progress_bar()
    asked = context.run_config
    config = Path(str(asked["config"]))
    recipe, args = parse_arguments(shlex.split(str(asked["overrides"])), config)
    names = str(asked["clients"]).split()
    count = int(asked["min-clients"]) or len(names) or args.num_clients
    if not count:
        raise ValueError("how many clients there are is not known: give `num_clients`, or their names as `clients`.")
    clients = RemoteClients(grid, timeout=float(asked["timeout"]) or None)
    who = clients.wait_for(count, names)
    args.num_clients = len(who.names)
    args.client_max_layers = clients.max_layers or args.client_max_layers
    trainer = make_trainer(recipe, args, clients, who)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    traffic = {"bytes_down": clients.traffic.down, "bytes_up": clients.traffic.up}
    Path(args.output_dir, TRAFFIC_NAME).write_text(json.dumps(traffic) + "\n")
    print(f"Adapters, model card and plot are in {args.output_dir}/")
