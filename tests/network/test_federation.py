"""Runs on Flower's SuperLink and nodes of their own, with TLS and authentication, all on this machine."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file
from server_apps import kill_server_apps

from hf_devft import DevFTTrainer
from hf_devft.cli.arguments import parse_arguments
from hf_devft.network.certificates import make_node_key, make_server_certificate
from hf_devft.network.local import local_federation


RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("org-a", "org-b", "org-c")
CONFIG = """
stage_layers: [2, 4]
stage_rounds: [2]
clients_per_round: 2
local_steps: 2
per_device_train_batch_size: 4
learning_rate: 1.0e-2
federated_method: scaffold
wire_dtype: int8
lora_r: 4
task_eval_rows: 8
use_cpu: true
save_strategy: steps
save_steps: 1
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer, tasks):
    """A federation of three nodes, with their rows, a base and a config in its folder."""
    folder = tmp_path_factory.mktemp("network") / "federation"
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    with local_federation(folder, keeps_messages=True) as federation:
        tiny_llama().save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        (folder / "config.yaml").write_text(CONFIG + f"model_name_or_path: {folder}/base\n")
        for number, name in enumerate(NAMES):
            rows = tasks.select(range(20 * number, 20 * number + 15 + number))
            rows.select_columns(["prompt", "completion"]).to_json(folder / f"{name}.jsonl")
            federation.start_node(name, node_flags(folder, name))
        yield federation
    if before is None:
        del os.environ["OMP_NUM_THREADS"]


def node_flags(folder, name):
    files = ["--train_file", f"{folder}/{name}.jsonl", "--output_dir", f"{folder}/node-{name}"]
    return [*files, "--model_name_or_path", f"{folder}/base", "--use_cpu", "true"]


def start(federation, output_dir, timeout=0.0, **overrides):
    flags = " ".join(f"--{name} {value}" for name, value in overrides.items())
    options = {
        "config": f"{federation.folder}/config.yaml",
        "overrides": f"--output_dir {federation.folder}/{output_dir} {flags}",
        "clients": " ".join(NAMES),
        "keys": str(federation.authority.parent),
        "timeout": timeout,
    }
    return federation.run(RECIPES / "federation", options)


def ended(run) -> str:
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 0, said
    return said


def wait_for(condition, seconds=100):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it has not happened"
        time.sleep(0.1)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(place):
    """A run of all rounds."""
    said = ended(start(place, "whole"))
    assert "3 of 3 clients have joined: org-a, org-b, org-c." in said
    return place.folder / "whole"


def test_a_run_ends_as_a_simulation_of_the_same_clients_does(whole, place, tasks, tokenizer):
    folder = place.folder
    flags = ["--config", f"{folder}/config.yaml", "--output_dir", f"{folder}/simulated", "--num_clients", "3"]
    recipe, args = parse_arguments(flags, Path())
    rows = {name: tasks.select(range(20 * n, 20 * n + 15 + n)) for n, name in enumerate(NAMES)}
    trainer = DevFTTrainer(recipe.model_name_or_path, args, peft_config=recipe.lora_config(None), train_dataset=rows)
    trainer.train()
    for part in ("", "stage-1", "stage-1/submodel"):
        assert_same(adapter(whole / part), adapter(folder / "simulated" / part))
    card = (whole / "README.md").read_text()
    assert "each client's own data, on its own machine, over a network" in card


def test_nothing_of_the_rows_is_at_the_superlink(whole, place, tasks):
    """Neither in its database nor in what it has written."""
    kept = b"".join(path.read_bytes() for path in place.folder.glob("superlink*"))
    assert len(kept) > 10_000
    assert not any(row["prompt"].encode() in kept for row in tasks.select(range(60)))


def kill_server(run, place):
    kill_server_apps(place)
    run.kill()


def test_a_killed_server_goes_on_from_its_last_checkpoint(whole, place):
    run = start(place, "killed")
    wait_for((place.folder / "killed" / "checkpoint-2").exists)
    kill_server(run, place)
    assert not (place.folder / "killed" / "stage-2").exists()
    ended(start(place, "killed", resume_from_checkpoint="last"))
    assert_same(adapter(place.folder / "killed"), adapter(whole))


def test_nodes_that_end_within_their_turn_are_left_out_and_may_come_back(place):
    """One is killed, one is told to end and started again; the run goes on for as long as that takes."""
    begun = [place.log(name).count("round 1: ") for name in NAMES]
    run = start(place, "left", timeout=20.0, clients_per_round=3, local_steps=100, stage_layers=4, stage_rounds=50)
    wait_for(lambda: all(place.log(n).count("round 1: ") > b for n, b in zip(NAMES, begun, strict=True)))
    place.stop("org-c", signal.SIGKILL)
    place.stop("org-b")
    place.start_node("org-b", node_flags(place.folder, "org-b"))

    def dropped():
        ledgers = [json.loads(path.read_text()) for path in (place.folder / "left").glob("checkpoint-*/ledger.json")]
        return [record["dropped"] for record in max(ledgers, key=len, default=[])]

    wait_for(lambda: dropped()[-1:] == [["org-c"]], seconds=200)
    assert dropped()[0] == ["org-b", "org-c"]
    kill_server(run, place)
    assert "client org-c failed and was left out: ClientError: " in run.communicate()[0]


def test_strangers_are_turned_away(place, tmp_path):
    """A node whose key the SuperLink does not know, and one that does not know the SuperLink's authority."""
    place.start_node("stranger", node_flags(place.folder, "org-a"), known=False)
    make_server_certificate(tmp_path / "other", ["127.0.0.1"])
    authority = place.folder / "certificates" / "ca.crt"
    known = authority.read_bytes()
    make_node_key(place.folder / "certificates", "misled")
    authority.write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    try:
        place.start_node("misled", node_flags(place.folder, "org-a"))
        for name, reason in (
            ("stranger", "Failed to initialize the connection"),
            ("misled", "CERTIFICATE_VERIFY_FAILED"),
        ):
            wait_for(lambda name=name: place.processes[name].poll() is not None)
            assert reason in place.log(name)
    finally:
        authority.write_bytes(known)
