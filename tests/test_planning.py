import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from conftest import config, lora
from transformers import LlamaConfig, LlamaForCausalLM

from hf_devft.federation.partition import ClientData
from hf_devft.planning import plan_run
from hf_devft.progress import print_plan
from hf_devft.stages.streaming import empty_base


def empty_like(model) -> LlamaForCausalLM:
    with init_empty_weights():
        empty = LlamaForCausalLM(model.config)
    empty.tie_weights()
    return empty


# What each message is in all of a run's rounds, or in turns.
RUNS = {
    "fedit": {},
    "dirichlet": {"partition": "dirichlet", "partition_column": "family", "clients_per_round": 3},
    "ffa_lora": {"federated_method": "ffa_lora"},
    "fedsa_lora": {"federated_method": "fedsa_lora+fedprox"},
    "rolora": {"federated_method": "rolora"},
    "scaffold": {"federated_method": "scaffold"},
    "wire": {"wire_dtype": "int8", "wire_top_k": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "stage_layers": [1, 2, 4]},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_ledger_counts_what_was_planned(make_trainer, tmp_path, name):
    trainer = make_trainer(**RUNS[name])
    base = empty_like(trainer.model.get_base_model())
    clients = ClientData(trainer.train_dataset, trainer.clients.rows)
    plan = plan_run(trainer.args, base, trainer.peft_config, clients)
    trainer.train()
    for planned, stage in zip(plan.stages, trainer.stages, strict=True):
        assert planned.bytes == stage.totals["bytes"]
        assert planned.tokens == stage.totals["tokens"]
        assert planned.flops == pytest.approx(stage.totals["flops"], rel=0.05)
        assert planned.base_bytes == stage.totals["base_bytes"]
    assert plan.total.bytes == trainer.ledger.bytes


def test_memory_is_what_a_run_takes():
    script = Path(__file__).parent / "planned_memory.py"
    # So that glibc gives freed memory back: its heap may otherwise hold twice what the tensors need.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    output = subprocess.check_output([sys.executable, script], env=environment, text=True, timeout=300)
    for planned, measured in json.loads(output.splitlines()[-1]):
        assert planned == pytest.approx(measured, rel=0.2)


# The paper's set-ups: (config, stages, values of a LoRA of rank 32 on one layer).
PAPER = {
    "LLaMA2-7B": ((32000, 4096, 11008, 32, 32, 32), [4, 8, 16, 32]),
    "LLaMA3.1-8B": ((128256, 4096, 14336, 32, 32, 8), [4, 8, 16, 32]),
    "LLaMA2-13B": ((32000, 5120, 13824, 40, 40, 40), [5, 10, 20, 40]),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_set_ups(tmp_path, name, capsys):
    (vocabulary, hidden, intermediate, depth, heads, key_heads), stages = PAPER[name]
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    args = config(
        tmp_path, stage_layers=stages, stage_rounds=[75], num_clients=20, clients_per_round=2, local_steps=10,
        per_device_train_batch_size=16, model_init_kwargs={"quantization_config": {"load_in_4bit": True}},
    )  # fmt: skip
    plan = plan_run(args, empty_base(str(tmp_path)), lora(r=32, lora_alpha=64))
    narrow = hidden * key_heads // heads
    layer = 32 * (2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + intermediate))
    for stage, layers in zip(plan.stages, stages, strict=True):
        assert stage.trainable == layers * layer
        assert stage.bytes_down == stage.bytes_up == 4 * stage.trainable
        assert stage.bytes == 75 * 2 * 8 * stage.trainable
        assert stage.tokens == 75 * 2 * 10 * 16 * 512
    assert plan.total.bytes == pytest.approx(plan.without_stages.bytes * 15 / 32)
    # Four bits and a scale of float32 for 64 values, but for embeddings, head and norms.
    matrices = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * intermediate
    rest = 2 * (2 * vocabulary * hidden + (2 * depth + 1) * hidden)
    assert plan.stages[-1].base_bytes == depth * matrices * 0.5625 + rest
    assert plan.stages[0].client_memory < plan.stages[-1].client_memory / 4
    print_plan(plan)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "not read" in printed


def test_the_recipe_plans_without_weights(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=2048, hidden_size=64, intermediate_size=64, num_hidden_layers=16).save_pretrained(tmp_path)
    recipe = Path(__file__).parents[1] / "recipes" / "devft.py"
    command = [sys.executable, recipe, "--plan_json", "--model_name_or_path", tmp_path]
    plan = json.loads(subprocess.check_output(command, text=True, timeout=300))
    assert [stage["num_layers"] for stage in plan["stages"]] == [4, 8, 16]
    assert plan["measured"]


def test_checkpointing_keeps_less(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 2}
    with init_empty_weights():
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    plans = [
        plan_run(config(tmp_path, stage_layers=[2, 8], gradient_checkpointing=on), base, lora())
        for on in (False, True)
    ]
    assert plans[1].total.client_memory < 0.5 * plans[0].total.client_memory
    assert plans[1].total.flops == plans[0].total.flops
