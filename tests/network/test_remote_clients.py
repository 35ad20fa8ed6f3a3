"""Runs whose clients are participants of their own, against simulations of the same clients."""

import shutil

import pytest
import torch
from conftest import ANCHORS, CopyAtSaves, lora, tiny_llama
from flwr.app import ConfigRecord, RecordDict
from loopback import Loopback
from safetensors.torch import load_file

from hf_devft.federation.rounds import QuorumError
from hf_devft.network.messages import STAGE, TRAIN, TRAINED
from hf_devft.network.participant import Participant
from hf_devft.network.remote_clients import RemoteClients


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
