"""A participant: one client of a federation, with its own data, base and disk. It knows no network."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from datasets import Dataset, disable_progress_bars
from flwr.app import ConfigRecord

from hf_devft.federation.batches import client_loader
from hf_devft.federation.client_side import ClientSide
from hf_devft.federation.memory import Memory
from hf_devft.federation.methods import Clients, make_methods
from hf_devft.federation.wire import Wire
from hf_devft.files import atomic_file
from hf_devft.models.adapter_files import save_adapter
from hf_devft.models.layout import AdapterLayout
from hf_devft.network.client_state import ClientState, carry
from hf_devft.network.dry_steps import measure_layers
from hf_devft.network.fingerprints import hash_of_tokenizer, hash_of_weights
from hf_devft.network.messages import Joining, StageMessage, Turn, answer_to_record
from hf_devft.network.names import sign_name
from hf_devft.network.secure_sum import SecureSumError, SummingClient, to_fixed
from hf_devft.network.settings import OWN_OPTIONS, read_settings, training_options
from hf_devft.run.client_batches import make_sampler
from hf_devft.trainer.active_stage import ActiveStage
from hf_devft.trainer.devft_trainer import DevFTTrainer
from hf_devft.trainer.session import TrainingSession
from hf_devft.trainer.stage_runner import StageRunner


logger = logging.getLogger(__name__)


OWN_ADAPTER = "adapter"  # folder of a participant's own, where a part of it stays there


class UnknownStageError(ValueError):
    """A turn of a stage that this participant was not told of."""


@dataclass
class RunningStage:
    """The stage that a participant trains.

    Attributes:
        message: what was said of it. active: its model. runner: trains that. known: the stage's adapter, as far as no
            turn says it, flat; other values are zero.
    """

    message: StageMessage
    active: ActiveStage
    runner: StageRunner
    known: torch.Tensor


@dataclass
class Participant:
    """Trains as the server asks, from its own rows; keeps the base and the stage's submodel from turn to turn.

    Attributes:
        name: its own. model: the base, as for `DevFTTrainer`. rows: its data, likewise.
        folder: where it keeps what it must find again.
        own: which of the rows are its own; default: all.
        max_layers: most layers that it can train; 0 for no limit.
        measures_layers: whether it finds that out itself, see `measure_layers`, when it is asked to join a run of
            other options than before.
        options: of its own `DevFTConfig`, such as `use_cpu`; what local training depends on comes from the server.
        keep_states: of how many of its turns it keeps the state, for servers that go back to a checkpoint.
        secure_only: whether its updates go into secure sums alone.
        key: by which it signs its name.
    """

    name: str
    model: str
    rows: Dataset
    folder: Path
    max_layers: int = 0
    measures_layers: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    keep_states: int = 20
    secure_only: bool = False
    key: ec.EllipticCurvePrivateKey | None = None
    own: np.ndarray | None = None

    def __post_init__(self):
        self._settings: str | None = None
        self._measured: dict[str, Any] | None = None  # the options for which layers were measured
        self._trainer: DevFTTrainer | None = None
        self._session: TrainingSession | None = None
        self._stage: RunningStage | None = None
        self._sum: SummingClient | None = None

    @property
    def examples(self) -> int:
        """How many rows are its own."""
        return len(self.rows if self.own is None else self.own)

    @property
    def sum(self) -> SummingClient:
        """Its part in the secure sum of the round.

        Raises:
            SecureSumError: it has none: it was started anew within the round, say.
        """
        if self._sum is None:
            raise SecureSumError("this participant has no keys of the round")
        return self._sum

    def begin_sum(self, client: int) -> bytes:
        """Begin its part in the secure sum of a round, as this client; returns its public keys."""
        self._sum = SummingClient(client)
        return self._sum.public

    def join(self, settings: str, challenge: bytes) -> Joining:
        """Return what it says of itself.

        Args:
            settings: of the run, as far as they are known; see `shared_settings`.
            challenge: what the server has drawn, for the signature of its name.
        """
        if self.measures_layers and (asked := training_options(settings)) != self._measured:
            self._settings = self._trainer = self._session = self._stage = None  # what they hold is free then
            self.max_layers, self._measured = measure_layers(self.model, settings, self.rows, self.options), asked
            logger.info(f"{self.name} can train {self.max_layers or 'all'} layers")
        signature = b"" if self.key is None else sign_name(self.key, self.name, challenge)
        return self.itself(signature)

    def itself(self, signature: bytes = b"") -> Joining:
        """Return what there is to say of it now."""
        return Joining(self.name, self.examples, self.max_layers, signature)

    def enter_stage(self, message: StageMessage) -> None:
        """Build a stage's submodel, or go on with it.

        Raises:
            ValueError: another base than the server's, or a message that cannot be followed.
        """
        if self._stage is not None and self._stage.message.key == message.key:
            return
        record = message.records[-1]
        if self.max_layers and record.num_layers > self.max_layers:
            raise ValueError(f"the stage has {record.num_layers} layers, this participant can hold {self.max_layers}")
        session = self._session_with(message.settings)
        self._check_tokenizer(message)
        self._stage = None
        healed = session.run.healed
        if message.taught:
            path = healed.path(record.stage)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_bytes(message.taught)
        adapter = session.run.adapter
        factory = session.stage_factory(session.models.release())
        sub = adapter.fuse(*record.adapter_rule)
        active = factory.enter(record, adapter, sub, distil=False, patched=False)
        if (found := hash_of_weights(active)) != message.base_hash:
            active.engine.close()
            raise ValueError(
                f"the submodel of stage {record.stage} has other weights here ({found[:12]}) than at the server "
                f"({message.base_hash[:12]}): {self.model} is another base, revision or dtype than the server's."
            )
        session.models.use(active.engine)
        known = _known(active.engine.layout, message.places, message.untransmitted)
        self._stage = RunningStage(message, active, session.runner(active), known)

    def _check_tokenizer(self, message: StageMessage) -> None:
        """Refuse to train on other tokens, or in another chat template, than the server means."""
        found = hash_of_tokenizer(self._trainer.processing_class)
        if message.tokenizer_hash and found != message.tokenizer_hash:
            raise ValueError(
                f"the tokenizer, or its chat template, is another here ({found[:12]}) than at the server "
                f"({message.tokenizer_hash[:12]}): {self.model} is another base or revision than the server's."
            )

    def take_turn(self, turn: Turn, told: dict[int, bytes] | None = None) -> ConfigRecord:
        """Train as a turn asks, and remember what stays here; returns what is sent back.

        Args:
            told: what the others of a secure sum have told this client; None where the update is sent as it is.

        Raises:
            UnknownStageError: the turn's stage is another one.
            ValueError: a turn that cannot be followed.
        """
        if self._stage is None or self._stage.message.key != turn.stage_key:
            raise UnknownStageError(turn.stage_key)
        stage, trainer = self._stage, self._trainer
        assert trainer is not None
        if self.secure_only and told is None:
            raise ValueError("this participant takes part in secure sums alone: set `secure_aggregation`")
        secure = None if told is None else self.sum  # before it trains: it may have been started anew since
        run = re.sub(r"[^0-9a-f]", "", stage.message.run)
        kept = ClientState(self.folder / "state" / f"run-{run}-client-{turn.client}", self.keep_states)
        side, memory = self._side(stage, turn, *kept.load(turn.state_round))
        counts = _counts(side, turn.client)
        if told is not None and counts[1]:
            raise ValueError("a secure sum has updates alone, and this method sends more beside them")
        logger.info(f"round {turn.round_index + 1}: {self.name} trains {len(stage.active.layers)} layers")
        local = side.begin(turn.to_message(side.wire, *counts), self._batches(turn))
        trained = stage.runner.train_client(turn.learning_rate, local)
        answer = side.end(local, trained)
        if isinstance(answer, Exception):
            raise answer
        memory.commit()
        state = memory.state_dict()
        if state:
            needed = (turn.state_round, *turn.needed)
            kept.save(turn.round_index, state, stage.message.records[-1].stage, needed)
        masked = None
        if secure is not None and answer.adapter is not None:
            change = answer.adapter.decoded - side.method.payload(turn.client, local.start)
            masked = secure.mask(to_fixed(change.cpu().numpy(), turn.weight), told).astype("<u4").tobytes()
        if side.method.remembers and answer.adapter is not None:
            self._save_own_adapter(stage, trained[1])
        return answer_to_record(answer, trainer.args.wire_dtype, bool(state), masked)

    def _save_own_adapter(self, stage: RunningStage, trained: torch.Tensor) -> None:
        """Save the adapter that this participant has trained, of which a part never leaves it, as plain PEFT loads it
        on the base."""
        record, initial = stage.message.records[-1], self._session.run.adapter
        own = initial.expand(stage.active.engine.layout.state(trained), record.groups, record.transfer)
        try:
            save_adapter(self.folder / OWN_ADAPTER, *own.to_peft({}))
        except OSError as error:  # nothing that the federation needs
            logger.warning(f"{self.name}'s own adapter could not be saved: {error}")

    def _side(self, stage: RunningStage, turn: Turn, state: dict, depth: int) -> tuple[ClientSide, Memory]:
        """Make the client's half of a round, with what this client remembers."""
        args: Any = self._trainer.args
        layout, memory = stage.active.engine.layout, Memory()
        memory.load_state_dict(state)
        if depth:
            carry(memory, self._session.run.adapter, stage.message.records, depth)
        method, correction, *_ = make_methods(args.federated_method, args.federated_method_kwargs)
        examples = [0] * stage.message.num_clients
        if not 0 <= turn.client < len(examples):
            raise ValueError(f"client {turn.client} is none of {len(examples)}")
        examples[turn.client] = self.examples
        everyone = Clients(examples=examples, seed=args.seed, memory=memory)
        method.begin_run(everyone)
        method.begin_stage(layout, stage.known)
        method.begin_round(turn.round_index, stage.known, [turn.client])
        if correction is not None:
            correction.begin_run(everyone)
            correction.begin_stage(layout)
            correction.begin_round(stage.known)
        wire = Wire(args.wire_dtype, args.upload_fraction, memory)
        wire.begin_stage(layout)
        return ClientSide(method, correction, wire), memory

    def _batches(self, turn: Turn) -> Iterable:
        """Make the batches of a turn: those that a simulation would have of these rows."""
        trainer, own = self._trainer, np.arange(len(self.rows)) if self.own is None else self.own
        rows, collator = trainer.client_rows()
        everything = trainer.train_dataset  # the collator takes no column of lengths
        sampler = make_sampler(
            trainer.args, everything, {turn.client: own}, [(turn.round_index, turn.client)], trainer.placement
        )
        return client_loader(rows, collator, sampler, trainer.args).next_client()

    def _session_with(self, settings: str) -> TrainingSession:
        """Build the trainer of a run's settings, and load the base, unless that is done."""
        if self._session is None or self._settings != settings:
            disable_progress_bars()
            own = OWN_OPTIONS | {"output_dir": str(self.folder)} | self.options
            args, adapter = read_settings(settings, own)
            self._settings = self._trainer = self._session = self._stage = None  # one base at a time
            self._trainer = DevFTTrainer(self.model, args, peft_config=adapter, train_dataset=self.rows)
            trainer: Any = self._trainer
            self._session = TrainingSession(trainer, trainer.run, trainer.models, None)
            self._settings = settings
        return self._session


def _counts(side: ClientSide, client: int) -> tuple[int, int]:
    """How many values a client's message has, and that of the correction, 0 without one."""
    extra = None if side.correction is None else side.correction.download()
    return side.method.download(client).numel(), 0 if extra is None else extra.numel()


def _known(layout: AdapterLayout, places: Sequence[int], values: bytes) -> torch.Tensor:
    """The adapter as far as a stage's message says it; zero elsewhere."""
    if not set(places) <= set(layout.all) or len(set(places)) != len(places):
        raise ValueError(f"the stage's message has tensors {places}, of {len(layout)}")
    known, count = torch.zeros(sum(layout.sizes)), layout.count(places)
    if len(values) != 4 * count:
        raise ValueError(f"the stage's message has {len(values)} bytes of the adapter, not {4 * count}")
    if places:
        layout.put(known, places, torch.frombuffer(bytearray(values), dtype=torch.float32))
    return known
