import os

import pytest
import torch

from hf_devft.network.client_state import ClientState


def test_a_state_is_that_of_its_round(tmp_path):
    state = ClientState(tmp_path, keep=2)
    assert state.load(-1) == ({}, 0)
    for number in range(3):
        state.save(number, {"3/kept/key": torch.full((2,), float(number))}, stage=number + 1)
    tensors, stage = state.load(2)
    assert tensors["3/kept/key"].tolist() == [2.0, 2.0]
    assert stage == 3
    assert sorted(path.name for path in tmp_path.glob("round-*")) == ["round-2.safetensors", "round-3.safetensors"]


def test_what_was_just_written_stays_though_the_clock_was_put_back(tmp_path):
    state = ClientState(tmp_path, keep=2)
    for number in range(3):
        state.save(number, {"3/kept/key": torch.ones(2)}, stage=1)
        path = tmp_path / f"round-{number + 1}.safetensors"
        os.utime(path, (4e9, 4e9))  # in the future
    state.save(3, {"3/kept/key": torch.ones(2)}, stage=1)
    assert state.load(3)[1] == 1


def test_a_state_that_is_lost_or_broken_is_named(tmp_path):
    state = ClientState(tmp_path, keep=2)
    with pytest.raises(ValueError, match=r"kept of round 5 cannot be read from .*round-5.safetensors"):
        state.load(4)
    (tmp_path / "round-5.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="Only a new run can start without it"):
        state.load(4)
