"""The compose file: commands that the package and Flower take, and only the nodes' part of the API is open."""

import re
import shlex
from pathlib import Path

import yaml
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from transformers import HfArgumentParser

from hf_devft.network.node import ConnectionArguments, DataArguments


RECIPE = Path(__file__).parents[2] / "recipes" / "federation"
SERVICES = yaml.safe_load((RECIPE / "compose.yaml").read_text())["services"]


def command(service: str) -> list[str]:
    """Of a service, where the environment says nothing."""
    return shlex.split(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", SERVICES[service]["command"]))


def test_the_node_is_one_that_starts():
    module, *flags = command("node")[2:]
    assert module == "hf_devft.network.node"
    text = " ".join(flags).replace("--name ", "--name hospital ").replace("--superlink ", "--superlink 10.0.0.1:8000 ")
    data, connection = HfArgumentParser([DataArguments, ConnectionArguments]).parse_args_into_dataclasses(text.split())
    connection.check()
    folders = {volume.split(":")[1] for volume in SERVICES["node"]["volumes"]}
    used = [*data.train_file, data.output_dir, connection.root_certificates, connection.private_key]
    assert {f"/{Path(each).parts[1]}" for each in used} == folders


def test_the_superlink_has_what_flower_takes_and_authenticates_nodes():
    program, *flags = command("superlink")
    assert program == "flower-superlink"
    options = _parse_args_run_superlink().parse_args(flags)
    assert options.enable_supernode_auth
    assert options.ssl_keyfile == "/certificates/server.key"
    assert not options.insecure


def test_from_outside_only_nodes_api_is_reached():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    locations = re.findall(r"location (\S+) \{ (.*?); \}", (RECIPE / "proxy.conf").read_text())
    port = command("superlink")[command("superlink").index("--port") + 1]
    assert dict(locations) == {"/v1/fleet/": f"proxy_pass https://superlink:{port}", "/": "return 403"}


def test_the_image_has_files_that_are_there_and_the_pinned_torch():
    image, root = (RECIPE / "Dockerfile").read_text(), RECIPE.parents[1]
    copied = [file for line in re.findall(r"^COPY (.+)$", image, re.M) for file in line.split()[:-1]]
    assert {"src", "recipes", "setup.cfg"} <= set(copied)
    assert all((root / file).exists() for file in copied)
    assert re.search(r"torch==\S+", image)[0] in (root / "constraints.txt").read_text().split()
