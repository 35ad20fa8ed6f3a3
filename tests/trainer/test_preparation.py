"""What is said before a run of options that are likely a mistake."""

import pytest
import torch
from conftest import tiny_llama

from hf_devft.trainer import precision
from hf_devft.trainer.precision import emulates


@pytest.mark.parametrize(("capabilities", "emulated"), [
    ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, ["bf16", "fp16"]),
    ({"architecture": "x86_64", "avx2": True, "avx512_bf16": True}, ["fp16"]),
    ({"architecture": "x86_64", "amx_bf16": True, "avx512_fp16": True}, []),
    ({"architecture": "aarch64"}, []),
    ({}, []),
])  # fmt: skip
def test_which_cpus_have_half_precision(capabilities, emulated):
    assert [name for name in ("bf16", "fp16") if emulates(name, capabilities)] == emulated


def test_half_precision_on_a_cpu_without_it_is_said_once(make_trainer, monkeypatch, caplog):
    monkeypatch.setattr(precision, "cpu", lambda: {"architecture": "x86_64"})
    make_trainer()
    assert "bfloat16" not in caplog.text
    make_trainer(bf16=True, use_cpu=True)
    assert caplog.text.count("float32: set bf16 to false.") == 1
    caplog.clear()
    make_trainer(model=tiny_llama().to(torch.bfloat16), use_cpu=True)
    assert caplog.text.count("float32: load the base in float32 (`--model_init_kwargs") == 1
    caplog.clear()
    make_trainer(fp16=True, use_cpu=True)
    assert caplog.text.count("no instructions for float16, in which") == 1
    assert caplog.text.count("float32: set fp16 to false.") == 1
    monkeypatch.setattr(precision, "cpu", lambda: {"architecture": "x86_64", "avx512_bf16": True})
    caplog.clear()
    make_trainer(bf16=True, use_cpu=True)
    assert not caplog.text
