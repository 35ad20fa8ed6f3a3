import json

import pytest
from conftest import config, lora

from hf_devft.network.settings import SHARED_OPTIONS, read_settings, shared_settings


def test_a_client_trains_as_the_server_says_and_keeps_its_own(tmp_path):
    args = config(
        tmp_path / "server",
        local_steps=7,
        optim="sgd",
        seed=5,
        wire_dtype="int8",
        model_init_kwargs={"dtype": "float32"},
    )
    told = shared_settings(args, lora(r=4, lora_dropout=0.1))
    own, adapter = read_settings(told, {"output_dir": str(tmp_path / "own"), "use_cpu": True, "save_strategy": "no"})
    assert {name: getattr(own, name) for name in SHARED_OPTIONS} == {
        name: getattr(args, name) for name in SHARED_OPTIONS
    }
    assert own.output_dir == str(tmp_path / "own")
    assert own.model_init_kwargs == {"dtype": "float32"}
    assert (adapter.r, adapter.lora_dropout, adapter.target_modules) == (4, 0.1, "all-linear")
    assert str(tmp_path) not in told, "nothing of the server's places"


@pytest.mark.parametrize(
    "stolen",
    [
        {"options": {"output_dir": "/etc"}},
        {"options": {"push_to_hub": True}},
        {"options": {"resume_from_checkpoint": "/tmp/evil"}},
        {"model_options": {"trust_remote_code": True}},
        {"model_options": {"cache_dir": "/etc"}},
        {"model_options": {"attn_implementation": "someone/kernel@main"}},
    ],
)
def test_a_server_cannot_set_more(tmp_path, stolen):
    told = json.loads(shared_settings(config(tmp_path), lora()))
    for part, values in stolen.items():
        told[part] |= values
    with pytest.raises(ValueError, match="not a server's to set"):
        read_settings(json.dumps(told), {"output_dir": str(tmp_path)})


def test_an_adapter_names_no_files_and_no_code(tmp_path):
    told = json.loads(shared_settings(config(tmp_path), lora()))
    told["adapter"] |= {"base_model_name_or_path": "/etc/passwd", "megatron_core": "os", "auto_mapping": {"a": "b"}}
    adapter = read_settings(json.dumps(told), {"output_dir": str(tmp_path)})[1]
    assert (adapter.base_model_name_or_path, adapter.megatron_core, adapter.auto_mapping) == (
        None,
        "megatron.core",
        None,
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": 1}'])
def test_broken_settings_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="the server's settings cannot be read"):
        read_settings(text, {"output_dir": str(tmp_path)})
