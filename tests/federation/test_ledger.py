import json

import pytest
import torch
from conftest import lora, tiny_llama
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from hf_devft.federation.ledger import Ledger, RoundRecord
from hf_devft.files import as_record
from hf_devft.models.flops import flops_per_token, forward_flops
from hf_devft.run.peak_memory import PeakMemory


def record(round_number, stage, **kwargs):
    defaults = {
        "clients": ["a", "b"],
        "dropped": [],
        "bytes_down": 10,
        "bytes_up": 6,
        "tokens": 100,
        "padding": 30,
        "flops": 1e3,
        "seconds": 2.0,
        "peak_memory": 50 * round_number,
        "loss": 1.0,
    }
    return RoundRecord(round=round_number, stage=stage, **defaults | kwargs)


def test_totals_of_a_stage_and_of_all():
    ledger = Ledger([record(1, 1), record(2, 1, dropped=["b"]), record(3, 2)])
    assert ledger.totals()["bytes"] == 48
    assert ledger.totals(1) == {
        "bytes_down": 20,
        "bytes_up": 12,
        "bytes": 32,
        "tokens": 200,
        "padding": 60,
        "flops": 2e3,
        "seconds": 4.0,
        "simulated_seconds": 0.0,
        "peak_memory": 100,
        "dropped_clients": 1,
    }
    assert ledger.bytes_until(2) == 32


def test_a_ledger_keeps_count():
    ledger = Ledger([record(1, 1)])
    ledger.add(record(2, 1, bytes_up=7))
    assert ledger.bytes == ledger.totals()["bytes"] == 33
    assert ledger.flops == 2e3


def test_a_ledger_survives_json():
    ledger = Ledger([record(1, 1), record(2, 1)])
    records = as_record(json.loads(json.dumps(ledger.to_dicts())), list[RoundRecord], "the ledger")
    assert Ledger(records) == ledger


def test_flops_count_every_matrix_once():
    base = tiny_llama(2)
    matrices = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 16 * 24 * 3)  # q, o; k, v; gate, up, down
    head = 2048 * 16  # tied to the embedding
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(base) == (4 * (matrices + head),)
    model = get_peft_model(base, lora())
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert flops_per_token(model) == (4 * (matrices + head) + 6 * adapter,)
    assert flops_per_token(model, is_reference=True) == (6 * (matrices + head) + 6 * adapter,)


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
def test_of_a_module_that_is_trained_whole_the_copy_counts(whole):
    model = get_peft_model(tiny_llama(2), lora(target_modules=["q_proj"], modules_to_save=[whole]))
    plain = get_peft_model(tiny_llama(2), lora(target_modules=["q_proj"]))
    table = 2048 * 16  # tied
    more = {"lm_head": (6 - 4) * table, "embed_tokens": 0}  # a look-up costs nothing, trained or not
    assert flops_per_token(model)[0] - flops_per_token(plain)[0] == more[whole]


def test_of_a_mixture_the_experts_count_that_a_position_goes_through():
    found = []
    for chosen in (1, 2):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = MixtralConfig(
            vocab_size=64, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=chosen, **sizes
        )
        (flops,) = flops_per_token(MixtralForCausalLM(config).requires_grad_(False))
        found.append(flops)
    expert = 3 * config.hidden_size * config.intermediate_size
    assert found[1] - found[0] == 4 * config.num_hidden_layers * expert


def test_no_gradient_goes_through_layers_below_all_that_is_trained():
    model = get_peft_model(tiny_llama(4), lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3]))
    everywhere = get_peft_model(tiny_llama(4), lora(target_modules=["q_proj", "v_proj"]))
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 16 * 24 * 3
    (saved,) = (a - b for a, b in zip(flops_per_token(everywhere), flops_per_token(model), strict=True))
    assert saved == 2 * 2 * layer + 6 * adapter
    assert forward_flops(model.get_base_model()) > 0


def test_peak_memory_is_of_the_time_since_the_reset():
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.read()
    block = torch.ones(30_000_000)
    assert memory.read() - before > 0.8 * block.nbytes
    del block
    memory.release()
    memory.reset()
    assert memory.read() - before < 60_000_000
