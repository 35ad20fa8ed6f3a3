"""Runs on Flower's simulation engine: its SuperLink, Ray's processes, and no nodes."""

import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import make_trainer
from hf_devft.network.local import APP, LocalFederation, program
from hf_devft.network.server_app import TRAFFIC_NAME
from hf_devft.network.virtual_clients import virtual_clients


pytest.importorskip("ray")

RECIPE = Path(__file__).parents[2] / "recipes" / "simulation"
CONFIG = """
stage_layers: [2, 4]
stage_rounds: [2]
num_clients: 3
clients_per_round: 2
local_steps: 2
per_device_train_batch_size: 4
learning_rate: 1.0e-2
federated_method: scaffold
wire_dtype: int8
lora_r: 4
task_rows: 60
task_eval_rows: 8
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def superlink(tmp_path_factory, tokenizer):
    """A SuperLink that simulates its nodes, with a base and a config in its folder."""
    folder = tmp_path_factory.mktemp("simulation")
    federation = LocalFederation(folder)
    tiny_llama().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "config.yaml").write_text(CONFIG + f"model_name_or_path: {folder}/base\n")
    (folder / "flower").mkdir()
    connection = f'address = "{federation.address}"\ninsecure = true\n'
    (folder / "flower" / "config.toml").write_text(f"[superlink]\n[superlink.{APP}]\n{connection}")
    flags = ["--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(federation.port)]
    federation.start("superlink", [program("flower-superlink"), *flags, "--disable-runtime-dependency-installation"])
    ends = time.monotonic() + 60
    while not answers(federation.port):
        assert time.monotonic() < ends, federation.log("superlink")
        time.sleep(0.1)
    yield federation
    federation.stop("superlink")


def answers(port):
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def test_virtual_clients_end_where_the_simulation_in_one_process_ends(superlink):
    folder = superlink.folder
    said = run(superlink, "run", nodes=3)
    assert (folder / "run" / TRAFFIC_NAME).exists(), said
    flags = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / "alone")]
    make_trainer(*parse_arguments(flags)).train()
    adapters = [load_file(folder / name / "adapter_model.safetensors") for name in ("run", "alone")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    assert any((folder / "run" / "clients").glob("client-*/state"))  # SCAFFOLD's control variates stay there


def test_another_number_of_virtual_nodes_is_refused(superlink):
    said = run(superlink, "refused", nodes=2)
    assert "2 virtual nodes for 3 clients" in said
    assert "num-supernodes=3" in said
    assert not (superlink.folder / "refused").exists()


def test_a_process_stands_for_each_client_in_turn(superlink):
    flags = f"--output_dir {superlink.folder}/clients-of-a-process"
    clients = virtual_clients(str(superlink.folder / "config.yaml"), flags)
    taken = [(clients.take_place(number), clients.participant.own, clients.participant.name) for number in range(3)]
    assert taken[0][0] is taken[2][0]  # one base, one submodel
    assert [name for *_, name in taken] == clients.data.names
    assert all(own is clients.data.rows[name] for _, own, name in taken)
    assert clients.participant.folder == superlink.folder / "clients-of-a-process" / "clients" / "client-2"
    assert clients.participant.examples == 20  # of 60


def run(superlink, output_dir, nodes):
    options = f'config="{superlink.folder}/config.yaml" overrides="--output_dir {superlink.folder}/{output_dir}"'
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
    done = subprocess.run(
        [program("flwr"), "run", str(RECIPE), APP, "--stream"]
        + ["--federation-config", federation, "--run-config", options],
        capture_output=True, text=True, env=superlink.environment, timeout=300, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr
