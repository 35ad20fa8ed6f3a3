"""A participant's node: a process that stays, with the base and the stage's submodel in its memory.

    devft federation node --name hospital-a --train_file data.jsonl --superlink 10.0.0.1:8000 \\
        --root_certificates certificates/ca.crt --private_key certificates/hospital-a.key

It speaks to Flower's SuperLink as a SuperNode does, by the same code. Flower's own SuperNode asks for messages every
three seconds, and starts a process for each, which would load the base anew: for that, see `client_app`.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    push_object_contents_from_iterable,
)
from flwr.supernode.fleet_http_connection import http_request_response

from hf_devft.cli.arguments import OneLineParser
from hf_devft.cli.errors import one_line_errors
from hf_devft.network.participant import Participant
from hf_devft.network.parts import pull_parts
from hf_devft.network.polling import pause
from hf_devft.network.replies import reply_to
from hf_devft.tasks import TASKS
from hf_devft.tasks.data import load_datasets, load_files


logger = logging.getLogger("hf_devft.network.node")  # also where it is the main module


@dataclass
class DataArguments:
    """A participant: its name, data and base."""

    name: str = field(metadata={"help": "Its name in the federation, which no other has."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Its rows: JSON, JSONL, CSV, TSV, Parquet or text files."}
    )
    dataset_name: list[str] | None = field(
        default=None, metadata={"help": "Or datasets on the Hub, or local folders."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Their configuration (subset)."})
    dataset_train_split: str = field(default="train", metadata={"help": "Their split."})
    task: str = field(default="text-generation", metadata={"help": "What the rows are for."})
    model_name_or_path: str = field(
        default="embedded", metadata={"help": "The base, the same as the server's: a Hub name, a path, or embedded."}
    )
    revision: str | None = field(default=None, metadata={"help": "Of a base on the Hub: a branch, tag or commit."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of what stays here. Default: outputs/ and the name."}
    )
    max_layers: int = field(default=0, metadata={"help": "Most layers that it can train; 0 for no limit."})
    measure_layers: bool = field(
        default=False, metadata={"help": "Find that number by a step with one layer and one with two, before the run."}
    )
    keep_states: int = field(
        default=20, metadata={"help": "Of how many turns it keeps its state, for a server that goes back."}
    )
    secure_only: bool = field(
        default=False, metadata={"help": "Send updates into secure sums alone, whatever the server asks."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU, where there is an accelerator, too."})

    def participant(self) -> Participant:
        """Make the participant; reads its rows.

        Raises:
            ValueError: data that cannot be read, or none.
        """
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError("give the participant's rows: --train_file or --dataset_name, one of them.")
        if self.max_layers and self.measure_layers:
            raise ValueError(f"max_layers={self.max_layers} is not to be measured: leave measure_layers out.")
        if self.keep_states < 1:
            raise ValueError(f"keep_states={self.keep_states}: give 1 or more.")
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown: choose one of {', '.join(TASKS)}.")
        to_columns = TASKS[self.task].to_columns
        if self.train_file is not None:
            rows = load_files(self.train_file, to_columns)
        else:
            rows = load_datasets(self.dataset_name, self.dataset_config, self.dataset_train_split, to_columns)
        folder = Path(self.output_dir or f"outputs/{self.name}")
        options: dict[str, Any] = {"use_cpu": True} if self.use_cpu else {}
        if self.revision is not None:
            options["model_init_kwargs"] = {"revision": self.revision}
        return Participant(
            name=self.name,
            model=self.model_name_or_path,
            rows=rows,
            folder=folder,
            max_layers=self.max_layers,
            measures_layers=self.measure_layers,
            options=options,
            keep_states=self.keep_states,
            secure_only=self.secure_only,
        )


@dataclass
class ConnectionArguments:
    """How a node reaches the SuperLink."""

    superlink: str = field(default="127.0.0.1:8000", metadata={"help": "Its address, host:port."})
    root_certificates: str | None = field(
        default=None, metadata={"help": "The certificate authority (PEM) by which the SuperLink is known."}
    )
    private_key: str | None = field(
        default=None, metadata={"help": "This node's key (OpenSSH, EC), whose public half the SuperLink knows."}
    )
    insecure: bool = field(default=False, metadata={"help": "Without TLS and authentication. For trials alone."})

    def check(self) -> None:
        """Refuse a connection that is not what it seems.

        Raises:
            ValueError: no TLS or no key, though it was not asked for.
        """
        given = self.root_certificates is not None or self.private_key is not None
        if self.insecure and given:
            raise ValueError("insecure has no use for root_certificates and private_key: leave either out.")
        if not self.insecure and (self.root_certificates is None or self.private_key is None):
            raise ValueError(
                "a node needs root_certificates, by which it knows the SuperLink, and its private_key "
                "(`devft federation certificates` makes them); --insecure goes without, for trials."
            )

    @property
    def keys(self) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey] | None:
        """The node's pair of keys."""
        if self.private_key is None:
            return None
        try:
            private = load_ssh_private_key(Path(self.private_key).read_bytes(), None)
        except (OSError, ValueError) as error:
            raise ValueError(f"private_key={self.private_key} cannot be read: {error}.") from error
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError(f"private_key={self.private_key} is no key of an elliptic curve: make one anew.")
        return private, private.public_key()


class Connection:
    """A node's place at the SuperLink.

    Args:
        functions: what Flower's connection gives: the node's number, and functions of the Fleet API.
    """

    def __init__(self, functions: tuple):
        self.node, self._receive, self._send, _, _, self._pull, self._push, self._confirm = functions

    def receive(self) -> Message | None:
        """Fetch the next message, whole; None where there is none."""
        if (received := self._receive()) is None:
            return None
        message, tree = received
        run, number = message.metadata.run_id, message.metadata.message_id
        contents = pull_parts(
            [part.object_id for part in iterate_object_tree(tree)],
            pull_object_fn=lambda part: self._pull(run, part),
        )
        self._confirm(run, number)
        whole: Any = inflate_object_from_contents(number, contents)
        whole.metadata.__dict__["_message_id"] = number  # which it cannot know of itself
        return whole

    def reply(self, message: Message, content: RecordDict, seconds: float) -> None:
        """Send an answer, after this many seconds of work."""
        answer = Message(content, reply_to=message)
        answer.metadata.__dict__["_message_id"] = answer.object_id
        with no_object_id_recompute():
            tree, objects = get_object_tree(answer), get_all_nested_objects(answer)
            wanted, session = self._send(answer, tree, seconds)
            push_object_contents_from_iterable(
                ((part, objects[part].deflate()) for part in wanted),
                push_object_fn=lambda part, body: self._push(message.metadata.run_id, session, part, body),
            )


@contextmanager
def connect(arguments: ConnectionArguments) -> Iterator[Connection]:
    """Connect to the SuperLink; ends the process where that does not know the node, or is not who it should be."""
    certificates = arguments.root_certificates and Path(arguments.root_certificates).read_bytes()
    with http_request_response(arguments.superlink, arguments.insecure, certificates, arguments.keys) as functions:
        yield Connection(functions)


def serve(connection: Connection, participant: Participant, goes_on: Callable[[], bool] = lambda: True) -> None:
    """Answer the server's messages, one after another."""
    idle_since = time.perf_counter()
    while goes_on():
        try:
            message = connection.receive()
        except Exception as error:  # a run that has ended in the middle of a message, say
            logger.warning(f"a message could not be read: {type(error).__name__}: {error}")
            message = None
        if message is None or not message.has_content():
            time.sleep(pause(time.perf_counter() - idle_since))
            continue
        started = time.perf_counter()
        content = reply_to(participant, message.content)
        try:
            connection.reply(message, content, time.perf_counter() - started)
        except Exception as error:  # the run may be over, or the server gone
            logger.warning(f"an answer could not be sent: {error}")
        idle_since = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a node until it is told to end.

    Args:
        argv: its flags; default: the process's.
    """
    ours, shown = logging.getLogger("hf_devft"), logging.StreamHandler()
    shown.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours.addHandler(shown)
    ours.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the SuperLink is told that it ends
    with one_line_errors():
        data, connection = OneLineParser([DataArguments, ConnectionArguments]).parse_args_into_dataclasses(argv)
        participant = data.participant()
        connection.check()
        participant.key = connection.keys and connection.keys[0]
        try:
            run_node(connection, participant)
        except KeyboardInterrupt:
            ours.info(f"{data.name} ends")


def run_node(arguments: ConnectionArguments, participant: Participant) -> NoReturn:
    """Connect a participant to the SuperLink, and answer what comes.

    Raises:
        ConnectionError: the connection was lost.
        SystemExit: Flower's, where the node is not admitted; the log says what may be wrong.
    """
    place = None
    logger.info(f"{participant.name} asks {arguments.superlink} to let it in")
    try:
        with connect(arguments) as place:
            logger.info(f"{participant.name}, {len(participant.rows)} rows, is connected to {arguments.superlink}")
            serve(place, participant)
    except SystemExit:
        if place is None:
            logger.error(
                f"{arguments.superlink} does not admit this node. Is its key registered (`flwr supernode register`), "
                "and is it the SuperLink of --root_certificates? A node that was killed is admitted again when the "
                "SuperLink has noticed, after a minute."
            )
        raise
    raise ConnectionError(f"the connection to {arguments.superlink} was lost")  # which Flower has logged


if __name__ == "__main__":
    main()
