"""A federation on Flower's simulation engine: clients that are no machines, on one machine or a cluster of Ray's.

    flwr run recipes/simulation local --federation-config "num-supernodes=1000" \\
        --run-config 'config="/srv/study/config.yaml"' --stream

Each virtual node is a client of the config's data, cut as `devft train` cuts it, so that the run ends where that one
ends, with as many threads. Messages are those of a real federation. Each of Ray's processes has one base and one
submodel, for all nodes whose turns it takes; what stays with a client is in `clients/` of the output folder, which all
machines must share.
"""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from hf_devft.cli.recipe import load_data
from hf_devft.configuration.stage_folder import CLIENTS
from hf_devft.federation.partition import ClientData
from hf_devft.network.messages import JOIN, refusal
from hf_devft.network.participant import Participant
from hf_devft.network.remote_clients import RemoteClients
from hf_devft.network.replies import reply_to
from hf_devft.network.server_app import asked_run, check_run, log_openly, train
from hf_devft.network.settings import shared_settings
from hf_devft.trainer.preparation import check_enough, clients_of


# A statement each, as Flower looks for them by reading this file.
server = ServerApp()
client = ClientApp()


@dataclass
class VirtualClients:
    """The clients of a run that one process stands for, in turn.

    Attributes:
        data: the rows of all clients. participant: trains as the one whose turn it is. folder: of what they keep.
    """

    data: ClientData
    participant: Participant
    folder: Path

    def take_place(self, number: int) -> Participant:
        """Return the participant, as the client of this number."""
        name = self.data.names[number]
        self.participant.name, self.participant.own = name, self.data.rows[name]
        self.participant.folder = self.folder / f"client-{number}"  # a name may be no folder's
        return self.participant


@cache
def virtual_clients(config: str, overrides: str) -> VirtualClients:
    """Make the clients of a run, once a process."""
    recipe, args = asked_run({"config": config, "overrides": overrides})
    data, folder = clients_of(args, load_data(recipe, args)[0]), Path(args.output_dir) / CLIENTS
    options = {"use_cpu": args.use_cpu, "model_init_kwargs": args.model_init_kwargs}
    return VirtualClients(
        data, Participant("", recipe.model_name_or_path, data.dataset, folder, options=options), folder
    )


@client.query(JOIN)
@client.train()
def answer(message: Message, context: Context) -> Message:
    """Answer a message of the server's, as the client that this node stands for."""
    run = (str(context.run_config[key]) for key in ("config", "overrides"))
    try:
        participant = virtual_clients(*run).take_place(int(context.node_config["partition-id"]))
    except (ValueError, OSError, ImportError) as error:  # other files or devices than the server has
        return Message(refusal(str(error)), reply_to=message)
    return Message(reply_to(participant, message.content), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says.

    Its keys: `config` and `overrides`, as in `server_app`.

    Raises:
        ValueError: a config, data or options that cannot be trained so, or another number of virtual nodes.
    """
    log_openly()
    recipe, args = asked_run(context.run_config)
    check_run(recipe, args)
    if args.secure_aggregation:
        raise ValueError("virtual nodes keep no keys from message to message: leave `secure_aggregation` out.")
    if not Path(args.output_dir).is_absolute():
        raise ValueError(f"output_dir={args.output_dir}: give its whole path, as Flower and Ray start from elsewhere.")
    rows, *of_server = load_data(recipe, args)
    names = clients_of(args, rows).names
    check_enough(args, len(names))
    if (nodes := count_nodes(grid, len(names))) != len(names):
        raise ValueError(
            f"there are {nodes} virtual nodes for {len(names)} clients: set "
            f'`--federation-config "num-supernodes={len(names)}"`, or `num_clients`.'
        )
    clients = RemoteClients(grid)
    who = clients.wait_for(len(names), names, shared_settings(args, recipe.lora_config(args.task)), timeout=None)
    args.num_clients = len(names)
    train(recipe, args, clients, (who, *of_server))


def count_nodes(grid: Grid, expected: int) -> int:
    """Count the virtual nodes, which Flower registers while the server starts; waits for a moment until there are as
    many as expected."""
    ends = time.monotonic() + 5
    while (nodes := len(list(grid.get_node_ids()))) != expected and time.monotonic() < ends:
        time.sleep(0.1)
    return nodes
