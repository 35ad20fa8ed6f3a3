"""Runs whose clients are participants of their own, against simulations of the same clients."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ANCHORS, CopyAtSaves, lora, tiny_llama
from cryptography.hazmat.primitives.asymmetric import ec
from datasets import Dataset
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from loopback import Loopback
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_devft.cli.arguments import parse_arguments
from hf_devft.federation.rounds import QuorumError
from hf_devft.network.messages import TRAIN, TRAINED, refusal
from hf_devft.network.participant import Participant
from hf_devft.network.remote_clients import RemoteClients, in_order
from hf_devft.network.server_app import train
from hf_devft.trainer import recomputation


METHODS = {
    "fedit": {},
    "int4": {"wire_dtype": "int4"},
    "top-k": {"federated_method": "scaffold", "wire_dtype": "bf16", "upload_fraction": 0.2},
    "ffa_lora": {"federated_method": "ffa_lora+fedprox", "wire_dtype": "int8"},
    "rolora": {"federated_method": "rolora+fedadam"},
    "fedsa_lora": {"federated_method": "fedsa_lora", "wire_dtype": "int8"},
    "flexlora": {"federated_method": "flexlora"},
    "droppeft": {"federated_method": "droppeft+fedavgm"},
    "head": {"grouping": "prefix", "temporary_head": True} | ANCHORS,
    "healed": {"fusion": "bridge", "grouping": "bridged", "transfer": "anchor", "healing_steps": 2},
    "adapters": {"stage_layers": None, "adapter_layers": [2, 4]},
    "four parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """A folder of a tiny base."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows(tasks):
    """Three participants' rows, by name."""
    return {f"org-{letter}": tasks.select(range(20 * k, 20 * k + 15 + k)) for k, letter in enumerate("abc")}


@pytest.fixture
def participants(tmp_path, base, rows):
    """One for each, on nodes 11 to 13, in another order than that of their names."""
    names = reversed(list(rows))
    return {
        11 + k: Participant(name, base, rows[name], tmp_path / "nodes" / name, options={"use_cpu": True})
        for k, name in enumerate(names)
    }


@pytest.fixture
def remote_run(make_trainer, base):
    """A trainer whose clients are on a grid."""

    def make(grid, **options):
        clients = RemoteClients(grid, timeout=60)
        who = clients.wait_for(len(grid.participants))
        return make_trainer(
            model=base, train_dataset=who, remote_clients=clients, peft_config=lora(r=4), **(RUN | options)
        )

    return make


RUN = {"clients_per_round": 2, "num_clients": 3}


def adapters(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_over_a_network_ends_as_the_simulation_does(
    remote_run, make_trainer, participants, rows, base, tmp_path, name
):
    simulated = make_trainer(
        model=base,
        train_dataset=rows,
        peft_config=lora(r=4),
        output_dir=tmp_path / "simulated",
        **(RUN | METHODS[name]),
    )
    simulated.train()
    grid = Loopback(participants)
    trainer = remote_run(grid, **METHODS[name])
    trainer.train()
    for folder in ("", "stage-1", "stage-1/submodel"):
        theirs, ours = (adapters(tmp_path / run / folder) for run in ("simulated", "run"))
        if name == "fedsa_lora":  # B stays with the clients: the simulation alone knows it
            theirs, ours = ({k: v for k, v in each.items() if "lora_A" in k} for each in (theirs, ours))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    ledgers = [
        [(r.clients, r.bytes_down, r.bytes_up, r.loss, r.flops) for r in t.ledger.rounds] for t in (simulated, trainer)
    ]
    assert ledgers[0] == ledgers[1]
    told = sum(r.bytes_up for r in trainer.ledger.rounds)
    moved = sum(
        len(content[TRAINED][part])
        for _, content in grid.replied
        if TRAINED in content
        for part in ("adapter", "correction")
    )
    assert told == moved, "the ledger counts what has travelled"
    assert trainer.remote_clients.traffic.up < told + 1000 * len(grid.replied)


def test_what_a_participant_has_trained_alone_is_an_adapter_of_its_own(remote_run, participants, base, tmp_path):
    grid = Loopback(participants)
    remote_run(grid, federated_method="fedsa_lora", clients_per_round=3).train()
    own = {
        each.name: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), each.folder / "adapter")
        for each in participants.values()
    }
    of_the_server = adapters(tmp_path / "run")
    factors = {name: adapters(tmp_path / "nodes" / name / "adapter") for name in own}
    key = next(key for key in of_the_server if "lora_B" in key)
    assert not of_the_server[key].any(), "the server knows no B"
    assert all(own[key].any() for own in factors.values())
    assert not torch.equal(factors["org-a"][key], factors["org-b"][key])
    prompt = torch.tensor([[5, 6, 7]])
    answers = [model(prompt).logits for model in own.values()]
    assert not torch.equal(answers[0], answers[1])
    assert factors["org-a"].keys() == of_the_server.keys(), "at full depth"


STATEFUL = {"federated_method": "scaffold", "wire_dtype": "int4"}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def simulated(make_trainer, base, rows, tmp_path):
    """The final adapter of a simulation with these options."""

    def make(**options):
        trainer = make_trainer(
            model=base, train_dataset=rows, peft_config=lora(r=4), output_dir=tmp_path / "simulated", **(RUN | options)
        )
        trainer.train()
        return adapters(tmp_path / "simulated")

    return make


class Restarting(Loopback):
    """Every participant is started anew after each turn; its folder stays."""

    def answer(self, node, content):
        answer = super().answer(node, content)
        old = self.participants[node]
        self.participants[node] = Participant(old.name, old.model, old.rows, old.folder, options=old.options)
        return answer


def test_participants_that_are_started_anew_go_on(remote_run, participants, simulated, tmp_path):
    grid = Restarting(participants)
    remote_run(grid, **STATEFUL).train()
    assert_same(adapters(tmp_path / "run"), simulated(**STATEFUL))


class FewerRows(Loopback):
    """One participant is started anew after its first turn, with fewer rows and a limit."""

    def answer(self, node, content):
        answer = super().answer(node, content)
        old = self.participants[node]
        if old.name == "org-a" and TRAINED in answer and old.max_layers == 0:
            self.participants[node] = Participant(
                old.name, old.model, old.rows.select(range(5)), old.folder, 2, options=old.options
            )
        return answer


def test_a_participant_that_is_started_anew_says_what_it_has_now(remote_run, participants):
    options = {"clients_per_round": 2, "stage_layers": [2, 4], "stage_rounds": [6, 3]}
    trainer = remote_run(FewerRows(participants), **options)
    trainer.train()
    asked = [set(record.clients) for record in trainer.ledger.rounds]
    assert sum("org-a" in each for each in asked[:6]) > 1, "it has been started anew by then"
    assert trainer.clients.examples == [5, 16, 17]
    assert asked[6:] == [{"org-b", "org-c"}] * 3, "its limit is planned with"
    assert not any(record.dropped for record in trainer.ledger.rounds)


def test_clients_keep_what_the_best_round_may_ask_for(remote_run, participants, tmp_path):
    """The best round is further back than a client keeps states."""
    for participant in participants.values():
        participant.keep_states = 1

    class WorseAndWorse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    options = STATEFUL | {
        "clients_per_round": 3, "stage_layers": [2, 4], "stage_rounds": [4, 1], "load_best_model_at_end": True,
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "eval_dataset": participants[11].rows,
    }  # fmt: skip
    trainer = remote_run(Loopback(participants), callbacks=[WorseAndWorse()], **options)
    trainer.train()
    assert [record.dropped for record in trainer.ledger.rounds] == [[]] * 5


def test_a_server_goes_on_from_a_checkpoint_with_what_its_clients_had_kept_then(remote_run, participants, tmp_path):
    """Two rounds after the checkpoint, the server starts anew from it: the clients go back with it."""
    options = STATEFUL | {"save_strategy": "steps", "save_steps": 1, "clients_per_round": 3}
    remote_run(Loopback(participants), callbacks=[CopyAtSaves()], **options).train()
    resumed = remote_run(Loopback(participants), output_dir=tmp_path / "run-at-1", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same(adapters(tmp_path / "run-at-1"), adapters(tmp_path / "run"))


class Changing(Loopback):
    """Changes what one participant sends."""

    def __init__(self, participants, node, change):
        super().__init__(participants)
        self.node, self.change = node, change

    def answer(self, node, content):
        answer = super().answer(node, content)
        return self.change(answer) if node == self.node and TRAINED in answer else answer


def changed(**values):
    return lambda answer: RecordDict({TRAINED: ConfigRecord(dict(answer[TRAINED]) | values)})


HOSTILE = {
    "not finite": (changed(adapter=b"\xff" * 4), "has .* bytes, this one has 4"),
    "NaN": (
        lambda answer: changed(adapter=b"\xff" * len(answer[TRAINED]["adapter"]))(answer),
        "returned an adapter that is not finite",
    ),
    "too large": (changed(adapter=bytes(10**6)), "this one has 1000000"),
    "not bytes": (changed(adapter="all of it"), "adapter is a str, not a bytes"),
    "a count below zero": (changed(positions=[-5]), "not a number of tokens"),
    "endless operations": (changed(flops=float("inf")), "no number of operations"),
    "more operations than there are": (changed(flops=1.7e308), "no number of operations"),
    "more tokens than there are": (changed(positions=[2**62, 2**62]), "not a number of tokens"),
    "no loss": (changed(loss=float("inf")), "no loss"),
    "another record": (lambda answer: RecordDict({"gift": ConfigRecord({})}), "has no record 'trained'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_client_sends_the_run_goes_on_without_it(remote_run, participants, caplog, name):
    change, message = HOSTILE[name]
    trainer = remote_run(Changing(participants, 12, change), clients_per_round=3, stage_layers=[4], stage_rounds=[1])
    trainer.train()
    assert trainer.ledger.rounds[0].dropped == ["org-b"]
    assert re.search(message, caplog.text)
    assert all(bool(torch.isfinite(value).all()) for value in adapters(Path(trainer.args.output_dir)).values())


class Forging(Loopback):
    """One participant's replies say that they answer another message, or cannot be read."""

    def __init__(self, participants, readable):
        super().__init__(participants)
        self.readable = readable

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)  # which are gone then
        for reply in replies:
            if TRAINED in reply.content and reply.metadata.src_node_id == 12:
                if not self.readable:
                    raise ValueError("no message")
                reply.metadata.__dict__["_reply_to_message_id"] = "another"
        return replies


@pytest.mark.parametrize("readable", [True, False])
def test_what_a_reply_says_of_itself_ends_no_run_and_takes_no_other_with_it(remote_run, participants, readable):
    trainer = remote_run(Forging(participants, readable), clients_per_round=3, stage_layers=[4], stage_rounds=[1])
    trainer.train()
    assert trainer.ledger.rounds[0].dropped == ([] if readable else ["org-b"])


def test_a_refusal_is_one_line_in_the_log(remote_run, participants, caplog):
    class Shouting(Loopback):
        def answer(self, node, content):
            shouts = node == 12 and TRAIN in content
            return refusal("no\nround 7/20\x1b[2J" + "x" * 10**6) if shouts else super().answer(node, content)

    trainer = remote_run(Shouting(participants), clients_per_round=3, stage_layers=[4], stage_rounds=[1])
    trainer.train()
    (said,) = [record.message for record in caplog.records if "round 7/20" in record.message]
    assert said.isprintable()
    assert len(said) < 1000


def test_beside_a_secure_sum_nothing_is_sent_in_the_clear(remote_run, participants):
    """Such as SCAFFOLD's gradients, whatever a server asks for."""
    options = {"federated_method": "scaffold", "clients_per_round": 3, "stage_layers": [4], "stage_rounds": [1]}
    grid = Loopback(participants)
    trainer = remote_run(grid, round_retries=0, **options)
    trainer.args.secure_aggregation = True  # behind the checks of a server of ours
    with pytest.raises(QuorumError):
        trainer.train()
    assert not any(TRAINED in content for _, content in grid.replied)


def test_a_client_counts_that_does_not_know_its_loss(remote_run, participants):
    """As a simulated one, of whose steps one had no labels."""
    grid = Changing(participants, 12, changed(loss=float("nan")))
    trainer = remote_run(grid, clients_per_round=3, stage_layers=[4], stage_rounds=[1])
    trainer.train()
    (record,) = trainer.ledger.rounds
    assert record.dropped == []
    assert np.isfinite(record.loss)


def test_an_error_about_rows_is_not_told_to_the_server(remote_run, participants, rows, caplog):
    chat = Dataset.from_dict({"messages": [[{"role": "Dr Meier", "content": "Jane Roe has a cold."}]]})
    participants[12].rows = chat
    grid = Loopback(participants)
    remote_run(grid, clients_per_round=3, stage_layers=[4], stage_rounds=[1]).train()
    sent = b"".join(record.deflate() for _, content in grid.replied for record in content.values())
    assert b"its own log says more" in sent
    assert b"Meier" not in sent
    assert "Meier" in caplog.text, "its own log"


def test_nothing_but_the_update_leaves_a_client(remote_run, participants, rows, tokenizer):
    grid = Loopback(participants)
    remote_run(grid, clients_per_round=3, stage_layers=[4], stage_rounds=[1]).train()
    turns = [content for _, content in grid.replied if TRAINED in content]
    assert len(turns) == 3
    allowed = {"adapter", "correction", "is_finite", "remembers", "loss", "grad_norm", "positions", "seen", "flops"}
    for content in turns:
        assert list(content) == [TRAINED]
        assert set(content[TRAINED]) == allowed
        assert content[TRAINED]["correction"] == b""
    sent = b"".join(record.deflate() for _, content in grid.replied for record in content.values())
    for row in (row for name in rows for row in rows[name]):
        tokens = tokenizer(row["prompt"])["input_ids"]
        assert row["prompt"].encode() not in sent
        assert row["completion"].encode() not in sent or len(row["completion"]) < 6
        assert not any(np.array(tokens[:4], kind).tobytes() in sent for kind in ("<i2", "<i4", "<i8", "<f4"))


def test_a_participant_with_another_base_is_left_out(remote_run, participants, tmp_path, tokenizer, caplog):
    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    participants[12].model = str(other)
    trainer = remote_run(Loopback(participants), clients_per_round=3, stage_rounds=[1])
    trainer.train()
    assert all(record.dropped == ["org-b"] for record in trainer.ledger.rounds)
    assert "the submodel of stage 1 has other weights here" in caplog.text


def test_a_participant_with_another_tokenizer_is_left_out(remote_run, participants, base, tmp_path, caplog):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    participants[12].model = str(other)
    trainer = remote_run(Loopback(participants), clients_per_round=3, stage_rounds=[1])
    trainer.train()
    assert all(record.dropped == ["org-b"] for record in trainer.ledger.rounds)
    assert "the tokenizer, or its chat template, is another here" in caplog.text


def test_clients_come_late_and_go(make_trainer, participants, base, caplog):
    """Their names are known: the run begins with two of them, one joins after a round, another goes."""
    grid = Loopback({node: participants[node] for node in (11, 12)})
    clients = RemoteClients(grid, timeout=60)
    who = clients.wait_for(2, names=["org-a", "org-b", "org-c"])
    assert who.examples == [0, 16, 17]

    class Moving(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                grid.participants[13] = participants[13]
            if state.global_step == 2:
                del grid.participants[12]

    trainer = make_trainer(
        model=base, train_dataset=who, remote_clients=clients, peft_config=lora(r=4), num_clients=3,
        clients_per_round=3, stage_layers=[4], stage_rounds=[3], callbacks=[Moving()],
    )  # fmt: skip
    trainer.train()
    assert [record.dropped for record in trainer.ledger.rounds] == [["org-a"], [], ["org-b"]]
    assert who.examples == [15, 16, 17]
    assert "org-a failed and was left out: ClientError: it is not connected" in caplog.text


def test_a_name_has_one_client(participants, caplog):
    participants[12].name = "org-c"
    clients = RemoteClients(Loopback(participants), timeout=60)
    clients.wait_for(2)
    assert clients.names == ["org-a", "org-c"]
    assert "'org-c' is here already, on another node" in caplog.text


def test_a_name_that_is_not_signed_by_its_key_cannot_join(participants, caplog):
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in ("org-a", "org-b", "org-c")}
    for participant in participants.values():
        participant.key = keys[participant.name]
    participants[13].name = "org-b"  # org-a, which has been admitted, under the name of another
    participants[14] = Participant("stock", "", participants[11].rows, participants[11].folder)  # has no key
    public = {name: key.public_key() for name, key in keys.items()}
    clients = RemoteClients(Loopback(participants), timeout=60, keys=public)
    clients.wait_for(2)
    assert clients.names == ["org-b", "org-c"]
    assert "calls itself 'org-b', but has not signed that with the key of 'org-b'" in caplog.text
    assert "there is no key of 'stock'" in caplog.text
    there = clients.attendance
    there.names, participants[14].name = [], "org-a"
    there._refusals.clear()  # a minute later
    there.greet(1.0)
    assert "'org-a' has no key to sign with, as Flower's own SuperNodes and --insecure have none" in caplog.text
    participants[14].key = keys["org-a"]
    there.greet(1.0)
    assert "org-a" not in there.node_of, "it is not asked at once"
    there._refusals.clear()
    there.greet(1.0)
    assert there.node_of["org-a"] == 14


def test_without_any_client_the_first_reason_is_the_cause(remote_run, participants):
    for participant in participants.values():
        participant.max_layers = 1
    trainer = remote_run(Loopback(participants), round_retries=0)
    with pytest.raises(QuorumError) as error:
        trainer.train()
    assert "the stage has 2 layers, this participant can hold 1" in str(error.value.__cause__)


@pytest.mark.parametrize("option", ["activation_checkpointing", "auto_activation_checkpointing"])
def test_participants_compute_layers_again_where_they_are_asked_or_must(
    remote_run, participants, simulated, monkeypatch, tmp_path, option
):
    monkeypatch.setattr(recomputation, "free_memory", lambda device: 0)
    remote_run(Loopback(participants), **{option: True}).train()
    for participant in participants.values():
        assert participant._stage.active.model.get_base_model().is_activation_checkpointing
    assert_same(adapters(tmp_path / "run"), simulated())


def test_a_late_clients_limit_is_planned_with_from_the_next_stage_on(make_trainer, participants, base):
    participants[11].max_layers = 2
    grid = Loopback({node: participants[node] for node in (12, 13)})
    clients = RemoteClients(grid, timeout=60)
    who = clients.wait_for(2, names=["org-a", "org-b", "org-c"])
    assert clients.max_layers is None

    class Joins(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            grid.participants[11] = participants[11]

    trainer = make_trainer(
        model=base, train_dataset=who, remote_clients=clients, peft_config=lora(r=4), num_clients=3,
        clients_per_round=2, stage_layers=[1, 3, 4], stage_rounds=[2], callbacks=[Joins()],
    )  # fmt: skip
    trainer.train()
    late = participants[11].name
    asked = [late in (*record.clients, *record.dropped) for record in trainer.ledger.rounds]
    assert not any(asked[2:]), "it is known to be too small for stages 2 and 3"


def test_stages_go_to_clients_that_can_hold_them(make_trainer, participants, base):
    participants[12].max_layers = 2
    clients = RemoteClients(Loopback(participants), timeout=60)
    who = clients.wait_for(3)
    trainer = make_trainer(
        model=base, train_dataset=who, remote_clients=clients, peft_config=lora(r=4),
        client_max_layers=clients.max_layers, **RUN,
    )  # fmt: skip
    trainer.train()
    first, second = (
        {name for record in trainer.ledger.rounds if record.stage == stage for name in record.clients}
        for stage in (1, 2)
    )
    assert "org-b" in first
    assert second == {"org-a", "org-c"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"federated_method": "flora"}, "use another method"),
        ({"federated_method": "c2a"}, "they stay with the clients"),
        ({"federated_method": "hetlora"}, "use flexlora or hlora"),
        ({"federated_method": "fedsa_lora", "transfer": "anchor"}, 'set transfer="broadcast"'),
        ({"client_dropout_rate": 0.1}, "clients drop out by themselves"),
        ({"client_selection": "resource_aware"}, "clients take the time they take"),
    ],
)
def test_what_a_network_cannot_do_is_refused_at_the_start(remote_run, participants, options, message):
    with pytest.raises(ValueError, match=message):
        remote_run(Loopback(participants), **options)


def secured(answers):
    """What clients have sent in place of their updates, as numbers."""
    return [np.frombuffer(content[TRAINED]["adapter"], "<u4") for _, content in answers if TRAINED in content]


@pytest.mark.parametrize("method", ["fedit", "ffa_lora+fedadam", "fedsa_lora"])
def test_the_server_sees_only_the_sum(remote_run, participants, simulated, tmp_path, method):
    options = {"federated_method": method, "clients_per_round": 3}
    grid = Loopback(participants)
    trainer = remote_run(grid, secure_aggregation=True, **options)
    trainer.train()
    open_run, secure_run = simulated(**options), adapters(tmp_path / "run")
    for key in open_run:
        if method != "fedsa_lora" or "lora_A" in key:
            torch.testing.assert_close(secure_run[key], open_run[key], rtol=2e-4, atol=2e-5)
    sent = secured(grid.replied)
    assert len(sent) == 3 * len(trainer.ledger.rounds)
    for numbers in sent:  # an update's own are near 0, or 2³² where they are negative
        assert 0.3 < ((numbers > 2**30) & (numbers < 3 * 2**30)).mean() < 0.7, "noise"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "secure: the server sees only sums of updates" in card
    assert "The data of a client stayed with it: only adapters travelled." in card


class Failing(Loopback):
    """One participant, or more, fails at a step of a secure sum."""

    def __init__(self, participants, step, failing=(12,)):
        super().__init__(participants)
        self.step, self.failing = step, failing

    def answer(self, node, content):
        fails = node in self.failing and self.step in content
        return refusal("a power cut") if fails else super().answer(node, content)


@pytest.mark.parametrize("step", ["keys", "shares", "train", "reveal"])
def test_a_secure_sum_survives_a_client(remote_run, make_trainer, participants, rows, base, tmp_path, step):
    """Whose update counts where it has arrived before."""
    options = RUN | {"clients_per_round": 3, "stage_layers": [4], "stage_rounds": [1]}
    trainer = remote_run(Failing(participants, step), **options | {"secure_aggregation": True})
    trainer.train()
    counts = step == "reveal"
    assert trainer.ledger.rounds[0].dropped == ([] if counts else ["org-b"])
    assert trainer.ledger.rounds[0].attempts == 1


def test_a_sum_is_of_more_than_half_of_those_that_were_asked(remote_run, participants, rows, base, tmp_path):
    """Of four clients two send no keys, and the sum would be of the other two."""
    participants[14] = Participant("org-d", base, rows["org-a"], tmp_path / "org-d", options={"use_cpu": True})
    grid = Failing(participants, "keys", failing=(12, 14))
    options = {"num_clients": 4, "clients_per_round": 4, "round_retries": 0, "secure_aggregation": True}
    with pytest.raises(QuorumError, match="2 clients have sent their keys, 3 are needed"):
        remote_run(grid, **options).train()


def test_a_sum_of_one_is_none(remote_run, participants):
    """Of two clients, one fails: the other's update would be the sum."""
    del participants[11]
    trainer = remote_run(Failing(participants, "train"), num_clients=2, round_retries=0, secure_aggregation=True)
    with pytest.raises(QuorumError):
        trainer.train()


class Lying(Loopback):
    """One participant says something else at a step of a secure sum."""

    def __init__(self, participants, step, said):
        super().__init__(participants)
        self.step, self.said = step, said

    def answer(self, node, content):
        if node == 12 and self.step in content:
            super().answer(node, content)
            return RecordDict({self.step: ConfigRecord(self.said)})
        return super().answer(node, content)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("keys", {"public": b"short"}),
        ("keys", {"public": "text"}),
        ("shares", {"0": b"for one alone"}),
        ("shares", {"x": b"for nobody"}),
        ("reveal", {"x": b"nothing"}),
    ],
)
def test_a_client_that_lies_in_a_secure_sum_is_left_out_alone(remote_run, participants, step, said):
    options = {"clients_per_round": 3, "stage_layers": [4], "stage_rounds": [1], "secure_aggregation": True}
    trainer = remote_run(Lying(participants, step, said), **options)
    trainer.train()
    assert trainer.ledger.rounds[0].dropped == ([] if step == "reveal" else ["org-b"])
    assert trainer.ledger.rounds[0].attempts == 1


def test_a_participant_can_insist_on_secure_sums(remote_run, participants):
    participants[12].secure_only = True
    trainer = remote_run(Loopback(participants), clients_per_round=3, stage_layers=[4], stage_rounds=[1])
    trainer.train()
    assert trainer.ledger.rounds[0].dropped == ["org-b"]


class Busy(Loopback):
    """A node is in the middle of something when it is asked for the first time."""

    asked = 0

    def push_messages(self, messages):
        (message,) = messages
        if message.metadata.dst_node_id == 12 and "join" in message.content:
            self.asked += 1
            if self.asked == 1:
                return ["unanswered"]
        return super().push_messages(messages)


def test_a_busy_node_is_asked_again_who_it_is(participants):
    grid = Busy(participants)
    assert RemoteClients(grid).wait_for(3, timeout=0.2).names == ["org-a", "org-b", "org-c"]
    assert grid.asked == 2


def test_runs_do_not_mix_what_clients_keep(remote_run, participants, simulated, tmp_path):
    """The same participants in another run before: this one starts from nothing."""
    remote_run(Loopback(participants), output_dir=tmp_path / "other", seed=7, **STATEFUL).train()
    remote_run(Loopback(participants), **STATEFUL).train()
    assert_same(adapters(tmp_path / "run"), simulated(**STATEFUL))
    runs = {path.name.split("-client-")[0] for path in (tmp_path / "nodes").glob("*/state/*")}
    assert len(runs) == 2


@given(arrival=st.permutations(range(5)))
def test_answers_are_added_up_in_the_order_of_the_messages(arrival):
    """However they arrive, and each as soon as those before it are there: a sum of three is rounded by its order."""
    messages = [SimpleNamespace(client=client) for client in range(5)]
    arrived = []

    def answers():
        for client in arrival:
            arrived.append(client)
            yield messages[client], f"of {client}"

    for message, answer in (ordered := in_order(messages, answers())):
        assert answer == f"of {message.client}"
        assert set(range(message.client + 1)) <= set(arrived)
    assert list(ordered) == []
    known = [client for client in arrival if client != 2]  # one is not heard of
    late = in_order(messages, ((messages[client], client) for client in known))
    assert [message.client for message, _ in late] == [0, 1, 3, 4]
    assert [message.client for message, _ in in_order(messages, answers())] == list(range(5))


def test_the_servers_table_is_of_the_stages_that_were_run(participants, base, tmp_path, capsys):
    """A run may end before its last stage."""
    flags = ["--config", "quickstart", "--model_name_or_path", base, "--output_dir", str(tmp_path / "run")]
    flags += ["--stage_layers", "2", "4", "--stage_rounds", "1", "--max_steps", "1", "--save_strategy", "no"]
    flags += ["--eval_strategy", "no", "--eval_on_start", "false", "--use_cpu", "true", "--num_clients", "3"]
    recipe, args = parse_arguments([*flags, "--predict_with_generate", "false"])
    clients = RemoteClients(Loopback(participants), timeout=60)
    who = clients.wait_for(3)
    train(recipe, args, clients, (who, None, None))
    shown = capsys.readouterr().out
    assert "1/2" in shown
    assert "2/2" not in shown
    assert "ended by max_steps, 1 of 2 rounds" in shown


def test_a_private_run_tells_nobody_who_its_clients_are(remote_run, participants, tmp_path):
    private = {"dp_noise_multiplier": 1.0, "dp_clipping_norm": 1.0, "stage_layers": [2, 4], "stage_rounds": [1]}
    remote_run(Loopback(participants), save_strategy="steps", save_steps=1, **private).train()
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "privacy_secret"]
    assert len(written) > 10
    assert not [path for path in written if b"org-" in path.read_bytes()]


def test_a_node_that_cannot_say_who_it_is_is_told_of(participants, caplog):
    class Broken(Loopback):
        def pull_messages(self, message_ids):
            raise RuntimeError("no message")

    clients = RemoteClients(Broken(participants), timeout=1)
    with pytest.raises(ValueError, match="0 of 3 clients can join"):
        clients.wait_for(3, timeout=None)
    assert "cannot join: its answer cannot be read: RuntimeError: no message" in caplog.text
