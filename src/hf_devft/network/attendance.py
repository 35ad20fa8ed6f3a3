"""Who of a federation's clients is there, and on which node."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, MessageType, RecordDict

from hf_devft.network.messages import JOIN, ClientError, Joining, Reply, joining_from_record, record_of, why_refused
from hf_devft.network.names import is_signed


logger = logging.getLogger(__name__)

# Seconds before a node that was refused is asked again: what it costs a round is little then.
REFUSED_FOR = 60.0


@dataclass(frozen=True)
class _Refusal:
    """Why a node does not take part, and when it is asked again, as it may have been mended."""

    why: str
    until: float


@dataclass
class Attendance:
    """Asks nodes who they are, and knows who has joined.

    Attributes:
        present: () -> the nodes that are connected.
        ask: (records by node, kind of message, seconds) -> each node's reply, or why there is none.
        keys: the clients' public keys, by name, by which each must have signed its name; None asks for no signature.
        names: of all clients that may join; any, while it is empty.
        settings: of the run, for clients that measure what they can train; see `shared_settings`.
    """

    present: Callable[[], Iterable[int]]
    ask: Callable[[dict[int, RecordDict], str, float | None], Iterator[tuple[int, Reply]]]
    keys: Mapping[str, ec.EllipticCurvePublicKey] | None = None
    names: list[str] = field(default_factory=list)
    settings: str = ""

    def __post_init__(self):
        self._joinings: dict[int, Joining] = {}  # of nodes that take part
        self._refusals: dict[int, _Refusal] = {}  # of nodes that do not

    @property
    def joined(self) -> dict[str, Joining]:
        """What the clients that are there have said of themselves, by name."""
        return {joining.name: joining for joining in self._joinings.values()}

    @property
    def node_of(self) -> dict[str, int]:
        """The nodes of the clients that are there, by name."""
        return {joining.name: node for node, joining in self._joinings.items()}

    @property
    def refusals(self) -> list[str]:
        """Why nodes have not joined that have been asked."""
        return [refusal.why for refusal in self._refusals.values()]

    def greet(self, timeout: float | None) -> None:
        """Ask nodes that are new who they are, and wait for answers: some seconds, or for all (None)."""
        present = set(self.present())
        for node in set(self._joinings) - present:
            del self._joinings[node]
        now = time.monotonic()
        new = [node for node in present - self._joinings.keys() if not self._is_refused(node, now)]
        if not new:
            return
        challenge = os.urandom(32)
        question = ConfigRecord({"settings": self.settings, "challenge": challenge})
        asked = {node: RecordDict({JOIN: question}) for node in new}
        for node, reply in self.ask(asked, f"{MessageType.QUERY}.{JOIN}", timeout):
            if isinstance(reply, ClientError):  # it may be in the middle of a turn: it is asked again
                self._refuse(node, str(reply), 0.0)
            else:
                self._note(node, reply, challenge)

    def renew(self, node: int, reply: RecordDict) -> None:
        """Take note of what a node that was started anew says of itself now, which is known by its name; one that
        measures what it can hold has not done so yet."""
        known = self._joinings.get(node)
        try:
            joining = joining_from_record(record_of(reply, JOIN))
        except ValueError:
            return
        if known is not None and joining.name == known.name:
            self._joinings[node] = replace(joining, max_layers=joining.max_layers or known.max_layers)

    def _note(self, node: int, reply: RecordDict, challenge: bytes) -> None:
        """Take note of who a node says that it is."""
        if (why := why_refused(reply)) is not None:
            self._refuse(node, why, REFUSED_FOR)
            return
        try:
            joining = joining_from_record(record_of(reply, JOIN))
            self._check(joining, challenge)
        except ValueError as error:
            self._refuse(node, str(error), REFUSED_FOR)
            return
        if joining.name in self.node_of:  # perhaps what is left of it before it was killed
            self._refuse(node, f"{joining.name!r} is here already, on another node", 0.0)
            return
        self._joinings[node] = joining
        self._refusals.pop(node, None)

    def _check(self, joining: Joining, challenge: bytes) -> None:
        """Refuse who is none of the clients, or not the one that it says.

        Raises:
            ValueError: the name is unknown, or not signed by its key.
        """
        name = joining.name
        if self.names and name not in self.names:
            raise ValueError(f"{name!r} is none of the clients {some_of(self.names)}")
        if self.keys is None:
            return
        if name not in self.keys:
            raise ValueError(f"there is no key of {name!r}")
        if not joining.signature:
            raise ValueError(f"{name!r} has no key to sign with, as Flower's own SuperNodes and --insecure have none")
        if not is_signed(self.keys[name], name, challenge, joining.signature):
            raise ValueError(f"it calls itself {name!r}, but has not signed that with the key of {name!r}")

    def _refuse(self, node: int, why: str, seconds: float) -> None:
        """Do without a node for some seconds."""
        before = self._refusals.get(node)
        if before is None or before.why != why:
            logger.warning(f"node {node} cannot join: {why}.")
        self._refusals[node] = _Refusal(why, time.monotonic() + seconds)

    def _is_refused(self, node: int, now: float) -> bool:
        return node in self._refusals and now < self._refusals[node].until


def some_of(names: Sequence[str], shown: int = 20) -> str:
    """Return names as text, the first ones of many."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "") or "none"
