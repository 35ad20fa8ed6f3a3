import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from conftest import ANCHORS, config, lora, tiny_llama
from launching import environment
from transformers import LlamaConfig, LlamaForCausalLM

from hf_devft.federation.partition import ClientData
from hf_devft.models.streaming import empty_base
from hf_devft.run.plan import plan_run
from hf_devft.run.plan_table import print_plan


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
    "rolora": {"federated_method": "rolora", "stage_rounds": [3, 2]},
    "droppeft": {"federated_method": "droppeft", "stage_rounds": [3], "client_dropout_rate": 0.0},
    "scaffold": {"federated_method": "scaffold"},
    "flexlora": {"federated_method": "flexlora"},
    "hlora": {"federated_method": "hlora", "wire_dtype": "int8"},
    "wire": {"wire_dtype": "int8", "upload_fraction": 0.1},
    "adapters": {"stage_layers": None, "adapter_layers": [1, 3, 4]},
    "bridged": {"grouping": "bridged", "fusion": "bridge", "transfer": "anchor", "calibration_samples": 8},
    "fewer rounds": {"max_steps": 3, "stage_layers": [1, 2, 4]},
    "accumulation": {"gradient_accumulation_steps": 2, "stage_layers": [1, 2, 4]},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_ledger_counts_what_was_planned(make_trainer, tmp_path, name):
    trainer = make_trainer(**RUNS[name])
    base = empty_like(trainer.model.get_base_model())
    clients = ClientData(trainer.train_dataset, trainer.clients.rows)
    plan = plan_run(trainer.args, base, trainer.peft_config, clients)
    trainer.train()
    begun = [stage for stage in trainer.stages if stage.rounds_done]
    for planned, stage in zip(plan.stages, begun, strict=True):
        assert planned.rounds == stage.rounds_done
        assert planned.bytes == stage.totals["bytes"]
        assert planned.tokens == stage.totals["tokens"]
        assert planned.flops == pytest.approx(stage.totals["flops"], rel=0.05)
        assert planned.base_bytes == pytest.approx(stage.totals["base_bytes"], rel=0.02 if name == "bridged" else 0)
        assert planned.setup_flops == pytest.approx(
            stage.totals["setup_flops"], rel=0.7
        )  # as long texts as a batch of a client
    assert plan.total.bytes == trainer.ledger.bytes


def test_a_head_for_the_early_stages_is_planned_beside_all_linear_modules(make_trainer):
    """Which PEFT has not taken apart, as in a recipe."""
    trainer = make_trainer(temporary_head=True, grouping="prefix", **ANCHORS)
    plan = plan_run(trainer.args, empty_like(trainer.model.get_base_model()), lora())
    trainer.train()
    clients = trainer.args.clients_per_round
    planned = [stage.bytes_down for stage in plan.stages]
    assert planned == [trainer.ledger.totals(stage)["bytes_down"] / (2 * clients) for stage in (1, 2)]


def test_layers_with_an_adapter_share_no_group_with_the_others(make_trainer):
    for chosen in ([0, 2], [3]):
        adapter = lora(target_modules=["q_proj"], layers_to_transform=chosen)
        trainer = make_trainer(peft_config=adapter, overwrite_output_dir=True)
        plan = plan_run(trainer.args, empty_like(trainer.model.get_base_model()), adapter)
        trainer.train()
        planned = [stage.bytes for stage in plan.stages]
        assert planned == [stage.totals["bytes"] for stage in trainer.stages]


def test_what_distillation_takes_of_the_server_is_planned(make_trainer):
    trainer = make_trainer(distillation_steps=4, calibration_samples=8, generation_max_new_tokens=12)
    base = empty_like(trainer.model.get_base_model())
    plan = plan_run(trainer.args, base, trainer.peft_config, ClientData(trainer.train_dataset, trainer.clients.rows))
    trainer.train()
    first, second = trainer.stages
    assert plan.stages[0].setup_flops == first.totals["setup_flops"] == 0
    assert plan.total.setup_flops == pytest.approx(second.totals["setup_flops"], rel=0.3)
    assert plan.without_stages.setup_flops == 0


def test_what_healing_takes_of_the_server_is_planned(make_trainer):
    trainer = make_trainer(healing_steps=4, calibration_samples=8, generation_max_new_tokens=12)
    base = empty_like(trainer.model.get_base_model())
    clients = ClientData(trainer.train_dataset, trainer.clients.rows)
    plan, plain = (plan_run(args, base, trainer.peft_config, clients) for args in (trainer.args, make_trainer().args))
    trainer.train()
    first, second = trainer.stages
    assert plan.stages[0].setup_flops == pytest.approx(first.totals["setup_flops"], rel=0.3)
    assert plan.stages[1].setup_flops == second.totals["setup_flops"] == 0
    assert plan.stages[0].server_memory > plain.stages[0].server_memory
    assert plan.stages[1] == plain.stages[1]


# Beside the submodels' clients, the process holds the whole base; a server that does not teach only sums up.
@pytest.mark.parametrize(("who", "options"), [
    ("clients", {"stage_layers": [4]}),
    ("server", {"stage_layers": [2, 4], "distillation_steps": 4, "healing_steps": 4}),
])  # fmt: skip
def test_memory_is_what_a_run_takes(who, options):
    command = [sys.executable, Path(__file__).parent / "planned_memory.py", json.dumps(options)]
    # So that glibc gives freed memory back: its heap may otherwise hold twice what the tensors need.
    variables = environment(Path(__file__).parents[1], MALLOC_MMAP_THRESHOLD_="1000000")
    output = subprocess.check_output(command, env=variables, text=True, timeout=300)
    for planned, measured in json.loads(output.splitlines()[-1])[who]:
        assert planned == pytest.approx(measured, rel=0.2)


def test_a_plan_is_printed_whole(tmp_path, capsys):
    LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=64, num_hidden_layers=4).save_pretrained(
        tmp_path
    )
    args = config(
        tmp_path, stage_layers=[2, 4], stage_rounds=[75], num_clients=20, per_device_train_batch_size=16,
        distillation_steps=10,
    )  # fmt: skip
    print_plan(plan := plan_run(args, empty_base(str(tmp_path)), lora(r=32)), "tiny, fedit")
    printed = capsys.readouterr().out
    assert plan.stages[-1].bytes / 75 == pytest.approx(92.7e6, rel=1e-3)
    assert (plan.num_clients, plan.clients_per_round) == (20, 2)
    assert "A round's 2 of 20 clients: up to 92.7 MB" in printed
    assert "…" not in printed
    assert {"stage", "all", "none"} <= set(printed.split())  # nothing is folded in 80 columns
    assert "not measured" in printed
    assert "on the server take" in printed


def test_the_recipe_plans_without_weights(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=2048, hidden_size=64, intermediate_size=64, num_hidden_layers=16).save_pretrained(tmp_path)
    recipe = Path(__file__).parents[2] / "recipes" / "devft.py"
    command = [sys.executable, recipe, "--plan_json", "--model_name_or_path", tmp_path]
    plan = json.loads(subprocess.check_output(command, text=True, timeout=300))
    assert [stage["num_layers"] for stage in plan["stages"]] == [4, 8, 16]
    assert plan["measured"]


def test_a_plan_says_where_messages_are_of_other_sizes(tmp_path, capsys):
    for method, says in (("flora", True), ("c2a", True), ("hetlora", True), ("flexlora", False), ("fedit", False)):
        print_plan(plan_run(config(tmp_path, federated_method=method), tiny_llama(), lora()), method)
        assert ("this method sends more or less" in capsys.readouterr().out) == says


def test_a_plan_does_not_guess_how_many_owners_rows_have(tmp_path, capsys):
    private = {"dp_noise_multiplier": 1.0, "dp_clipping_norm": 1.0, "dp_delta": 1e-3}
    natural = {"partition": "natural", "partition_column": "user", "num_clients": None}
    plan = plan_run(config(tmp_path, **private, **natural), tiny_llama(), lora())
    assert (plan.num_clients, plan.epsilon, plan.protects) == (None, None, "client")
    print_plan(plan, "tiny, fedit")
    said = capsys.readouterr().out
    assert "A round's 2 clients: up to" in said
    assert "ε depends on the clients and their rows" in said
    assert plan_run(config(tmp_path, **private, num_clients=20), tiny_llama(), lora()).epsilon > 0


def test_a_plan_has_as_many_clients_as_a_round_asks(tmp_path):
    natural = {"partition": "natural", "partition_column": "user", "num_clients": None}
    assert plan_run(config(tmp_path, clients_per_round=30, **natural), tiny_llama(), lora()).clients_per_round == 30
    few = {"num_clients": 8, "federated_method": "dofit", "federated_method_kwargs": {"domains": 5}}
    plan_run(config(tmp_path, clients_per_round=1, stage_rounds=[1], **few), tiny_llama(), lora())


def test_a_plan_refuses_what_a_private_run_would(tmp_path):
    args = config(tmp_path, dp_target_epsilon=8.0, dp_delta=1e-3, num_clients=20)
    with pytest.raises(ValueError, match="needs more clients a round than 10 times the noise multiplier"):
        plan_run(args, tiny_llama(), lora())


def test_a_plan_without_stages_is_one_row(tmp_path, capsys):
    print_plan(plan_run(config(tmp_path, stage_layers=[4]), tiny_llama(), lora()), "tiny, fedit")
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.split()[:1] in (["all"], ["none"], ["none:"])]


def test_checkpointing_keeps_less(tmp_path, capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 2}
    with init_empty_weights():
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    plans = [
        plan_run(config(tmp_path, stage_layers=[2, 8], activation_checkpointing=on), base, lora())
        for on in (False, True)
    ]
    assert plans[1].total.client_memory < 0.5 * plans[0].total.client_memory
    assert plans[1].total.flops == plans[0].total.flops
    print_plan(plans[0], "with")
    said = capsys.readouterr().out
    print_plan(plans[1], "without")
    assert plans[0].total.client_memory_checkpointed == plans[1].total.client_memory
    assert "--activation_checkpointing true" in said  # told to who may need it, and not to who has it
    assert "--activation_checkpointing" not in capsys.readouterr().out
