"""How many layers a participant finds that it can train."""

import pytest
from conftest import config, lora, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hf_devft.network import dry_steps
from hf_devft.network.dry_steps import layers_that_fit, measure_layers
from hf_devft.network.participant import Participant
from hf_devft.network.settings import shared_settings


@given(st.integers(1, 10**9), st.integers(1, 10**8), st.integers(0, 10**10), st.integers(1, 100))
def test_as_many_layers_fit_as_the_room_has(one, layer, room, depth):
    fit = layers_that_fit([one, one + layer], room, depth)
    assert 0 <= fit < max(depth, 2)
    if fit == 0:
        assert one + (depth - 1) * layer <= room
    elif fit > 1:
        assert one + (fit - 1) * layer <= room < one + fit * layer


def test_layers_too_small_to_be_seen_all_fit():
    assert layers_that_fit([100, 100], 10, 8) == 0
    assert layers_that_fit([100], 10, 1) == 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer):
    """A base of six layers whose steps take some ten megabytes each."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 192, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_machine_with_little_memory_says_so(wide, tasks, tmp_path, monkeypatch):
    settings = shared_settings(config(tmp_path, federated_method="fedsa_lora", per_device_train_batch_size=32), lora())
    seen = []
    monkeypatch.setattr(dry_steps, "layers_that_fit", lambda *given: seen.append(given) or layers_that_fit(*given))
    assert measure_layers(wide, settings, tasks, {"use_cpu": True}) == 0, "this machine holds them all"
    ((peaks, _, depth),) = seen
    assert depth == 6
    assert 2e6 < peaks[1] - peaks[0] < 2e8, "a layer was seen"
    monkeypatch.setattr(
        dry_steps, "free_memory", lambda device: (peaks[0] + 2.5 * (peaks[1] - peaks[0])) / dry_steps.USABLE
    )
    assert 1 <= measure_layers(wide, settings, tasks, {"use_cpu": True}) < 6


def test_it_is_measured_once_before_it_joins(tasks, tmp_path, tokenizer, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = shared_settings(config(tmp_path), lora())
    monkeypatch.setattr(dry_steps, "layers_that_fit", lambda *given: 3)
    own = {"measures_layers": True, "options": {"use_cpu": True}}
    participant = Participant("org-a", str(tmp_path / "base"), tasks, tmp_path / "own", **own)
    assert participant.join(settings, b"").max_layers == 3
    monkeypatch.setattr(dry_steps, "layers_that_fit", lambda *given: 2)
    assert participant.join(settings, b"").max_layers == 3
    other = shared_settings(config(tmp_path, per_device_train_batch_size=1), lora())
    assert participant.join(other, b"").max_layers == 2, "a run of other options"
    assert not list((tmp_path).glob("own/stage-*"))
