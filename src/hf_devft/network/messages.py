"""What travels between the server and a client, as Flower's records."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from flwr.app import ConfigRecord, RecordDict

from hf_devft.configuration import StageConfig
from hf_devft.federation.client_side import FromClient, ToClient
from hf_devft.federation.encoding import to_bytes
from hf_devft.federation.turns import LocalResult
from hf_devft.federation.wire import Wire
from hf_devft.files import as_record


# Names of records.
JOIN, STAGE, TRAIN, TRAINED, REFUSED = "join", "stage", "train", "trained", "refused"
# Of secure sums: public keys, what clients tell each other, and shares of what undoes the masks.
KEYS, SHARES, TOLD, REVEAL = "keys", "shares", "told", "reveal"
# Why a client refuses a turn: it does not have the stage, so that the server sends it.
NO_STAGE = "no stage"
_MOST = 2**40  # of anything that is counted
_LONGEST_TEXT = 500  # of what a node says
_MOST_FLOPS = 1e24  # in a client's turn: what trains the largest models


class ClientError(RuntimeError):
    """A client that cannot be reached, refuses a turn, or sends something else."""


# What comes back for a message to a client.
Reply: TypeAlias = RecordDict | ClientError


@dataclass(frozen=True)
class Joining:
    """What a client says of itself.

    Attributes:
        name: its own. examples: how many rows it has. max_layers: most layers that it can train; 0 for no limit.
        signature: of its name, see `sign_name`; empty where it has no key.
    """

    name: str
    examples: int
    max_layers: int = 0
    signature: bytes = b""


@dataclass(frozen=True)
class StageMessage:
    """What a client must know of a stage, sent once.

    Attributes:
        key: stands for all of it, in the turns that follow. run: of the run that it belongs to.
        settings: see `shared_settings`.
        records: of the stages up to this one, with their groups.
        num_clients: of the federation.
        places, untransmitted: of the tensors of the adapter that no turn has, and their values, as bytes of float32;
            see `FederatedMethod.untransmitted`.
        taught: the file of the submodel's healed layers or bridges; empty without.
        base_hash: of the submodel's base weights; see `hash_of_weights`.
        tokenizer_hash: of the server's tokenizer, see `hash_of_tokenizer`; empty where it has none.
    """

    key: str
    run: str
    settings: str
    records: list[StageConfig]
    num_clients: int
    places: list[int]
    untransmitted: bytes
    taught: bytes
    base_hash: str
    tokenizer_hash: str

    def to_record(self) -> ConfigRecord:
        """Return it as it travels."""
        records = [asdict(record) | {"metrics": {}, "totals": {}, "labels": None} for record in self.records]
        return ConfigRecord(vars(self) | {"records": json.dumps(records)})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StageMessage":
        """Read it.

        Raises:
            ValueError: it is not one of ours.
        """
        try:
            kinds = cls.__annotations__ | {"records": str, "places": list}  # as they travel
            values = {name: typed(record, name, kind) for name, kind in kinds.items()}
            records = as_record(json.loads(values.pop("records")), list[StageConfig], "its records")
            for each in records:
                each.check()
            return cls(records=records, **values)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"the stage's message cannot be read: {error}") from error


@dataclass(frozen=True)
class Turn:
    """A client's turn, as it arrives: its values are read when the stage's layout is known.

    Attributes:
        stage_key: of the stage that it belongs to.
        learning_rate: of the round.
        state_round: the last round in which this client's update has counted, whose state it goes on from; -1 for
            none.
        needed: further rounds whose state the server may go back to, as it has checkpoints of then.
        weight: of the client's update in a secure sum; 0 where it is sent as it is.
        round_index, client: see `ToClient`. adapter, correction: the bytes of its messages.
    """

    stage_key: str
    learning_rate: float
    state_round: int
    needed: list
    weight: float
    round_index: int
    client: int
    adapter: bytes
    correction: bytes

    @classmethod
    def of(
        cls,
        message: ToClient,
        dtype: str,
        stage_key: str,
        learning_rate: float,
        state_round: int,
        needed: list[int],
        weight: float,
    ) -> "Turn":
        """Make it of a message whose values are of this type on the wire."""
        correction = b"" if message.correction is None else to_bytes(message.correction, dtype)
        return cls(
            stage_key,
            learning_rate,
            state_round,
            needed,
            weight,
            message.round_index,
            message.client,
            to_bytes(message.adapter, dtype),
            correction,
        )

    def to_record(self) -> ConfigRecord:
        """Return it as it travels."""
        return ConfigRecord(vars(self))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Turn":
        """Read it.

        Raises:
            ValueError: it is not one of ours.
        """
        return cls(**{name: typed(record, name, kind) for name, kind in cls.__annotations__.items()})

    def to_message(self, wire: Wire, count: int, correction_count: int) -> ToClient:
        """Return the message, whose values are this many.

        Raises:
            ValueError: they are not.
        """
        correction = wire.parse_down(self.correction, correction_count) if correction_count else None
        adapter = wire.parse_down(self.adapter, count)
        return ToClient(self.round_index, self.client, adapter, correction)


def answer_to_record(answer: FromClient, dtype: str, remembers: bool, masked: bytes | None = None) -> ConfigRecord:
    """Return what a client sends back: its messages, and numbers of its training. Nothing else of it is sent.

    Args:
        dtype: of the values on the wire. remembers: whether the client has kept something of this turn.
        masked: what it sends in place of its update, in a secure sum.
    """
    adapter = b"" if answer.adapter is None else to_bytes(answer.adapter, dtype) if masked is None else masked
    result = answer.result
    return ConfigRecord(
        {
            "adapter": adapter,
            "correction": b"" if answer.correction is None else to_bytes(answer.correction, dtype),
            "is_finite": answer.adapter is not None,
            "remembers": remembers,
            "loss": float(result.loss),
            "grad_norm": math.nan if result.grad_norm is None else float(result.grad_norm),
            "positions": list(result.positions),
            "seen": result.seen,
            "flops": result.flops,
        }
    )


def answer_from_record(
    record: Mapping[str, Any], wire: Wire, count: int, correction_count: int
) -> tuple[FromClient, bool]:
    """Read what a client sends back, as one reads a file from a stranger.

    Args:
        count, correction_count: how many values its messages must have; 0 where there is none.

    Returns:
        It, and whether the client has kept something of its turn.

    Raises:
        ValueError: it is something else.
    """
    kinds = {"loss": float, "grad_norm": float, "positions": list, "seen": int, "flops": float}
    values = {name: typed(record, name, kind) for name, kind in kinds.items()}
    is_finite, remembers = (typed(record, name, bool) for name in ("is_finite", "remembers"))
    positions = tuple(values["positions"])
    if not all(type(each) is int and 0 <= each <= _MOST for each in (*positions, values["seen"], len(positions))):
        raise ValueError("what a client has counted is not a number of tokens")
    # A loss that is not a number is of a step whose rows have no labels.
    if not 0 <= values["flops"] <= _MOST_FLOPS or abs(values["loss"]) > _MOST:
        raise ValueError(f"flops={values['flops']}, loss={values['loss']} are no number of operations and no loss")
    loss, norm = torch.tensor(values["loss"]), values["grad_norm"]
    norm = None if math.isnan(norm) else norm
    result = LocalResult(loss, positions, seen=values["seen"], grad_norm=norm, flops=values["flops"], padding=0)
    if not is_finite:
        return FromClient(result, None, count, None, correction_count), False
    adapter = wire.parse_up(typed(record, "adapter", bytes), count)
    correction = wire.parse_up(typed(record, "correction", bytes), correction_count) if correction_count else None
    return FromClient(result, adapter, count, correction, correction_count), remembers


def joining_from_record(record: Mapping[str, Any]) -> Joining:
    """Read what a client says of itself.

    Raises:
        ValueError: it is something else.
    """
    joining = Joining(**{name: typed(record, name, kind) for name, kind in Joining.__annotations__.items()})
    if (
        not 0 < len(joining.name) <= 100
        or not joining.name.isprintable()
        or not 0 < joining.examples <= _MOST
        or not 0 <= joining.max_layers <= _MOST
    ):
        said = f"name={joining.name[:100]!r}, examples={joining.examples}, max_layers={joining.max_layers}"
        raise ValueError(f"{said}: it needs a name, an example or more, and no negative number of layers")
    return joining


def by_client(record: Mapping[str, Any]) -> dict[int, bytes]:
    """Read a record of bytes by clients' numbers.

    Raises:
        ValueError: it is something else.
    """
    return {int(client): typed(record, client, bytes) for client in record}


def to_clients(content: Mapping[int, bytes]) -> ConfigRecord:
    """Write bytes by clients' numbers."""
    return ConfigRecord({str(client): each for client, each in content.items()})


def refusal(why: str) -> RecordDict:
    """Return what a client answers that refuses a message."""
    return RecordDict({REFUSED: ConfigRecord({"why": why})})


def why_refused(reply: Reply) -> str | None:
    """Return why a client refuses; None where it does not."""
    if isinstance(reply, ClientError) or REFUSED not in reply:
        return None
    return one_line(str(reply[REFUSED].get("why")))


def one_line(text: str) -> str:
    """What a stranger has written, for a log: one line, and no long one."""
    return "".join(each if each.isprintable() else " " for each in text[:_LONGEST_TEXT])


def record_of(reply: RecordDict, name: str) -> ConfigRecord:
    """Return a record of a reply.

    Raises:
        ValueError: it has none of this name.
    """
    if name not in reply or not isinstance(record := reply[name], ConfigRecord):
        raise ValueError(f"it has no record {name!r}")
    return record


def typed(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a value of a record.

    Raises:
        ValueError: it is of another type, or missing.
    """
    value = record.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value
