"""Every federated method inside DevFT's stages: what it leaves behind, resumed, and on several processes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import CopyAtSaves, lora, resume_after_stages, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file
from test_launch import ROUNDING, difference, launch, run
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_devft import DevFTTrainer
from hf_devft.configuration.stage_folder import FEDERATION
from hf_devft.federation.methods import METHODS
from hf_devft.models.adapter_files import load_adapter
from hf_devft.trainer.stage_runner import StageRunner


# By name, each in the stages of `conftest.config`.
RUNS = {name: {"federated_method": name} for name in METHODS} | {
    "fedprox": {"federated_method": "rolora+fedprox", "federated_method_kwargs": {"mu": 0.1}},
    "scaffold": {"federated_method": "scaffold"},
    "fedadam": {"federated_method": "fedsa_lora+fedadam"},
    "fedavgm": {"federated_method": "fedavgm"},
    "int4": {"federated_method": "droppeft", "wire_dtype": "int4"},
    "progfed": {"grouping": "prefix", "fusion": "anchor", "transfer": "anchor", "temporary_head": True},
    "refl": {
        "federated_method": "droppeft",
        "client_selection": "resource_aware",
        "num_clients": 6,
        "stage_rounds": [3],
    },
    # On the server it is AdamW that steps.
    "distilled": {"distillation_steps": 3, "generation_max_new_tokens": 3, "learning_rate": 1e-2},
    "healed": {
        "grouping": "bridged",
        "fusion": "bridge",
        "transfer": "anchor",
        "healing_steps": 3,
        "distillation_steps": 2,
        "generation_max_new_tokens": 3,
        "learning_rate": 1e-2,
    },
    "adapters": {"stage_layers": None, "adapter_layers": [2, 4], "adapter_layers_from": "first"},
    "keep-last": {"client_max_layers": [2, 4], "beyond_capacity": "keep_last"},
    "private": {"federated_method": "ffa_lora+fedadam", "dp_noise_multiplier": 0.1},
    "robust": {"federated_method": "rolora+median", "round_quorum": 3, "wire_dtype": "int8"},
    "top-k": {"federated_method": "scaffold", "wire_dtype": "bf16", "upload_fraction": 0.2},
}
SCRIPT = Path(__file__).with_name("launched_methods.py")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_adapter_is_what_was_trained(trainer: DevFTTrainer, with_head: bool) -> None:
    """Plain PEFT on the plain base computes what the trained model computes, and the adapter has moved."""
    folder = Path(trainer.args.output_dir)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        trained = trainer.model(input_ids=ids).logits
        model = PeftModel.from_pretrained(tiny_llama(), folder)
        torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)
        assert (trained - tiny_llama()(input_ids=ids).logits).abs().max() > 1e-3
    compact = load_adapter(folder / "stage-1" / "submodel")[1]
    assert {key.split(".layers.")[1].split(".")[0] for key in compact if ".layers." in key} == {"0", "1"}
    assert any("lm_head" in key for key in compact) == with_head


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_what_it_trained_and_so_does_a_stopped_one(make_trainer, tmp_path, name):
    """Stopped between two stages and in the middle of one: the same files, bit for bit, but for clocks."""
    options = RUNS[name] | {
        "save_strategy": "steps",
        "save_steps": 1,
        "clients_per_round": 3,
        "peft_config": lora(r=4),
    }
    whole = make_trainer(output_dir=tmp_path / "whole", callbacks=[CopyAtSaves()], **options)
    whole.train()
    assert_adapter_is_what_was_trained(whole, with_head=name == "progfed")
    for stopped_at in (2, 3):
        folder = tmp_path / f"whole-at-{stopped_at}"
        resumed = make_trainer(output_dir=folder, **options)
        resumed.train(resume_from_checkpoint=True)
        for there in ("stage-1", "stage-2", "stage-2/submodel", f"checkpoint-{whole.state.global_step}"):
            assert difference(tmp_path / "whole" / there, folder / there) == 0
        ledgers = [[(r.bytes_down, r.bytes_up, r.flops, r.loss) for r in t.ledger.rounds] for t in (whole, resumed)]
        assert ledgers[0] == ledgers[1]


def test_the_card_says_what_was_used(make_trainer):
    trainer = make_trainer(
        federated_method="fedprox", federated_method_kwargs={"mu": 0.5}, wire_dtype="int8", upload_fraction=0.1
    )
    trainer.train()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "fedprox (mu 0.5)" in card
    assert "int8, 10% of a client's changes" in card
    assert "participants" not in card


def test_floras_adapter_has_all_that_was_stacked(make_trainer):
    trainer = make_trainer(federated_method="flora", stage_layers=[4], stage_rounds=[1], peft_config=lora(r=4))
    trainer.train()
    config, state = load_adapter(trainer.args.output_dir)
    assert config.r == 4 + 8, "an adapter that does nothing yet, and two clients'"
    assert config.lora_alpha / config.r == 4 / 4
    for key, tensor in state.items():
        assert tensor.shape[0 if "lora_A" in key else 1] == 12


def test_flora_does_not_forget_an_adapter_that_was_trained(make_trainer, tmp_path):
    make_trainer(stage_layers=[4], stage_rounds=[1], output_dir=tmp_path / "before").train()
    for method in ("flora", "fedex_lora"):
        options = {
            "peft_config": str(tmp_path / "before"),
            "federated_method": method,
            "output_dir": tmp_path / method,
        }
        if method == "flora":
            with pytest.raises(ValueError, match="an adapter that was trained before: every client"):
                make_trainer(**options)
        else:
            make_trainer(**options)
    make_trainer(peft_config=lora(init_lora_weights="orthogonal"), federated_method="fedex_lora")  # a product of zero
    with pytest.raises(ValueError, match="from a new A, which it draws itself"):
        make_trainer(peft_config=lora(init_lora_weights="orthogonal"), federated_method="flora")


def test_clients_of_hetlora_prune_ranks_that_shrink(make_trainer):
    """As weight decay makes all of them; half of them at a time."""
    options = {"federated_method_kwargs": {"client_ranks": [4], "gamma": 0.5}, "weight_decay": 50.0}
    trainer = make_trainer(
        federated_method="hetlora", peft_config=lora(r=4), stage_layers=[4], stage_rounds=[3], clients_per_round=4,
        **options,
    )  # fmt: skip
    trainer.train()
    sent = [(record.bytes_down, record.bytes_up) for record in trainer.ledger.rounds]
    whole = sent[0][0]
    assert sent[:2] == [(whole, whole), (whole, whole // 2)]
    assert sent[2][0] == whole // 2


def test_after_training_the_adapter_can_be_saved_again_but_not_trained_further(make_trainer, tmp_path):
    trainer = make_trainer(federated_method="flora")
    trainer.train()
    trainer.save_model(tmp_path / "again")
    assert difference(Path(trainer.args.output_dir), tmp_path / "again") == 0
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    with pytest.raises(ValueError, match="start a new trainer from the adapter"):
        trainer.train()


@pytest.mark.parametrize("name", ["fedit", "fedsa_lora", "c2a", "dofit"])
def test_layers_that_come_later_can_be_trained(make_trainer, name):
    """Where only anchors receive, the others keep what a new adapter has, in everything that is remembered."""
    trainer = make_trainer(
        federated_method=name, grouping="prefix", fusion="anchor", transfer="anchor", clients_per_round=4
    )
    trainer.train()
    state = weights(Path(trainer.args.output_dir))
    for layer in range(4):
        parts = {key: tensor for key, tensor in state.items() if f".layers.{layer}." in key}
        assert all(tensor.abs().max() > 1e-3 for key, tensor in parts.items() if "lora_A" in key)
        assert any(tensor.abs().max() > 1e-3 for key, tensor in parts.items() if "lora_B" in key)


def test_layers_of_any_architecture_can_be_left_out(make_trainer, caplog):
    """GPT-Neo's layers return tuples."""
    config = CONFIG_MAPPING["gpt_neo"](
        vocab_size=2048, hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]],
        max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    trainer = make_trainer(model=model, federated_method="droppeft", stage_layers=[4], stage_rounds=[2])
    trainer.train()
    assert "left out" not in caplog.text


def test_an_adapter_on_the_embeddings_is_resumed(make_trainer):
    options = {
        "peft_config": lora(target_modules=["q_proj", "embed_tokens"]),
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = make_trainer(**options)
    whole.train()
    first = weights(Path(whole.args.output_dir))
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, first[key]) for key, value in weights(Path(resumed.args.output_dir)).items())


@pytest.mark.parametrize("name", ["fedsa_lora", "scaffold", "fedit"])
def test_what_stays_with_the_clients_is_never_pushed(make_trainer, name):
    from hf_devft.hub.push import stage_push

    trainer = make_trainer(federated_method=name)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert (folder / "stage-1" / FEDERATION).exists() == (name != "fedit")
    assert not (folder / FEDERATION).exists(), "nor does it lie at the root"
    assert FEDERATION not in {Path(op.path_in_repo).name for op in stage_push(folder, 1).operations()}
    if name != "fedit":
        (folder / "stage-1" / FEDERATION).unlink()
        with pytest.raises(ValueError, match="never pushed"):
            make_trainer(federated_method=name).train(resume_from_checkpoint=str(folder / "stage-1"))


def test_the_best_round_comes_with_what_its_clients_had(make_trainer, eval_tasks, tmp_path):
    """Whatever is saved with it: a second stage starts from the best round's B of every client."""
    states = []
    for only_model in (False, True):
        trainer = make_trainer(
            output_dir=tmp_path / str(only_model), federated_method="fedsa_lora", eval_dataset=eval_tasks,
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
            save_only_model=only_model, stage_rounds=[3],
        )  # fmt: skip
        trainer.train()
        states.append(weights(Path(trainer.args.output_dir)))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"federated_method": "fedavg"}, "'fedavg' is unknown"),
        ({"federated_method": "flora", "transfer": "anchor"}, 'set transfer="broadcast" or "split"'),
        ({"federated_method": "scaffold", "auto_find_batch_size": True}, "steps taken again: leave one out"),
        ({"federated_method": "flexlora", "federated_method_kwargs": {"client_ranks": [3]}}, "LoRA's r=2"),
        ({"federated_method": "fedsa_lora+scaffold"}, "scaffold.* cannot go with .*fedsa_lora.*join it with fedit"),
        ({"federated_method": "dofit", "federated_method_kwargs": {"domains": 9}}, "there are 4 clients"),
        ({"grouping": "prefix"}, 'set fusion="anchor", adapter_fusion="anchor" and transfer="anchor"'),
        (
            {"temporary_head": True, "peft_config": lora(target_modules=["q_proj", "lm_head"])},
            "has an adapter already",
        ),
        ({"client_max_layers": [2, 2, 2, 4]}, "stage 2 has 4 layers, which only 1 clients can hold"),
        ({"client_selection": "resource_aware", "federated_method": "flora"}, "none can come late"),
        ({"client_selection": "resource_aware", "federated_method": "scaffold"}, "none can come late"),
        ({"client_max_layers": []}, "1 or more each"),
        ({"client_selection": "resource_aware", "client_selection_kwargs": {"patience": 1}}, "patience"),
        ({"client_resources": "nowhere.json"}, "cannot be read"),
        ({"wire_dtype": "int2"}, "int2.*int4"),
        ({"upload_fraction": 0.0}, "above 0"),
    ],
)
def test_what_cannot_be_combined_stops_before_any_work(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_clients_sit_out_stages_that_they_cannot_hold(make_trainer):
    trainer = make_trainer(client_max_layers=[2, 4], client_resources="simulated", stage_rounds=[4])
    trainer.train()
    names = trainer.clients.names
    asked = [
        {names.index(client) for r in trainer.ledger.rounds if r.stage == s for client in r.clients} for s in (1, 2)
    ]
    assert asked[0] == {0, 1, 2, 3}
    assert asked[1] == {1, 3}
    assert trainer.ledger.totals()["simulated_seconds"] == sum(r.simulated_seconds for r in trainer.ledger.rounds) > 0


def test_a_resumed_run_must_be_of_the_same_method(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=1, federated_method="fedprox").train()
    other = make_trainer(federated_method="fedprox", federated_method_kwargs={"mu": 1.0})
    with pytest.raises(ValueError, match="federated_method_kwargs"):
        other.train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """All runs on one process."""
    output = tmp_path_factory.mktemp("alone")
    result = run([sys.executable], {"output_dir": str(output), "runs": RUNS}, SCRIPT)
    assert result.returncode == 0, result.stderr
    return output


# What asks something of the engine: frozen parts (RoLoRA's, in "fedprox"), skipped layers, tapped gradients, open
# weights, a head.
# Distillation is part of "healed".
ON_ENGINES = ["flora", "droppeft", "fedprox", "scaffold", "progfed", "healed", "adapters"]
NOT_WHOLE = ["flora", "healed"]  # as their models are cut under ZeRO-3


@pytest.mark.parametrize(
    ("launcher", "options", "names", "tolerance"),
    [
        ("cpu-2", {}, list(RUNS), 0),
        ("cpu-2", {"client_placement": "data_parallel"}, ON_ENGINES, ROUNDING),
        ("zero2", {}, ON_ENGINES, ROUNDING),
        ("zero3", {}, [name for name in ON_ENGINES if name not in NOT_WHOLE], ROUNDING),
    ],
    ids=["client_parallel", "ddp", "zero2", "zero3"],
)
def test_methods_are_the_same_on_several_processes(alone, tmp_path, launcher, options, names, tolerance):
    runs = {name: RUNS[name] for name in names}
    result = launch(tmp_path, launcher, 2, {"output_dir": str(tmp_path), "runs": runs} | options, SCRIPT)
    assert result.returncode == 0, result.stderr
    for name in runs:
        for folder in ("stage-1", "stage-2"):
            assert difference(alone / name / folder, tmp_path / name / folder) <= tolerance, name
        ledgers = [json.loads((path / name / "ledger.json").read_text()) for path in (alone, tmp_path)]
        sent = [[(record["bytes_down"], record["bytes_up"]) for record in ledger] for ledger in ledgers]
        assert sent[0] == sent[1]


KEEP_LAST = {"client_max_layers": [2, 4], "beyond_capacity": "keep_last", "fusion": "anchor"}


def test_clients_that_cannot_hold_a_stage_keep_the_last_submodel(make_trainer, monkeypatch):
    """What they learn there reaches the layers that stand for the same layers in the running stage."""
    trainer = make_trainer(**KEEP_LAST, stage_layers=[2, 4], stage_rounds=[1], clients_per_round=4)
    ends, per_token, train = {}, {}, StageRunner.train_client

    def watched(self, learning_rate, turn):
        engine, before = self.stage.engine, turn.start.clone()
        result, adapter = train(self, learning_rate, turn)
        per_token[turn.round_index, turn.client] = result.flops / sum(result.positions)
        ends[turn.round_index, turn.client] = engine.layout.cut(adapter - before)
        assert trainer.models.engine is engine, "switched back"
        trainer.watched_layout = engine.layout
        return result, adapter

    monkeypatch.setattr(StageRunner, "train_client", watched)
    trainer.train()
    (first, second), groups = trainer.ledger.rounds, trainer.stages[0].groups
    per_layer = first.bytes_up // 4 // 2
    assert second.bytes_up == second.bytes_down == per_layer * (2 + 4 + 2 + 4), "each as deep as its client can hold"
    turns = [(0, range(4)), (1, (0, 2)), (1, (1, 3))]
    costs = [{per_token[index, client] for client in clients} for index, clients in turns]
    assert costs[0] == costs[1], "those who keep the two layers compute two"
    assert min(costs[2]) > max(costs[1])
    keys = trainer.watched_layout.keys
    for client, holds in enumerate([2, 4, 2, 4]):
        changes = dict(zip(keys, ends[1, client], strict=True))
        for group in groups:
            same = [changes[key.replace(".layers.0.", f".layers.{layer}.")] for layer in group for key in keys[:1]]
            alike = all(torch.equal(change, same[0]) for change in same)
            assert alike == (holds == 2 or len(group) == 1), "a group learns as one only where it is one layer"


def test_a_run_with_smaller_clients_goes_on(make_trainer, tmp_path):
    options = {**KEEP_LAST, "save_strategy": "steps", "save_steps": 1, "stage_layers": [2, 3, 4]}
    make_trainer(output_dir=tmp_path / "whole", callbacks=[CopyAtSaves()], **options).train()
    make_trainer(output_dir=tmp_path / "whole-at-5", **options).train(resume_from_checkpoint=True)
    assert difference(tmp_path / "whole" / "stage-3", tmp_path / "whole-at-5" / "stage-3") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"federated_method": "flora"}, 'beyond_capacity="sit_out"'),
        ({"federated_method": "scaffold"}, "gradients of clients that sit out would correct the others' for good"),
        ({"beyond_capacity": "wait"}, "wait.*sit_out"),
    ],
)
def test_what_cannot_be_done_on_two_submodels(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**KEEP_LAST | options)


@pytest.mark.parametrize(
    "options", [{"federated_method": "fedsa_lora"}, {"wire_dtype": "int8"}, {"upload_fraction": 0.5}]
)
def test_what_remembers_does_not_go_with_a_temporary_head(make_trainer, options):
    with pytest.raises(ValueError, match="dropped with the head"):
        make_trainer(temporary_head=True, **options)


def test_what_is_drawn_does_not_depend_on_who_came_before(make_trainer, tmp_path):
    """Dropout of a client that leaves layers out, in a run that was stopped within the stage."""
    options = {
        "federated_method": "droppeft", "peft_config": lora(lora_dropout=0.3), "save_strategy": "steps",
        "save_steps": 1, "stage_layers": [4], "stage_rounds": [3],
    }  # fmt: skip
    make_trainer(output_dir=tmp_path / "whole", callbacks=[CopyAtSaves()], **options).train()
    for stopped_at in (1, 2):
        folder = tmp_path / f"whole-at-{stopped_at}"
        make_trainer(output_dir=folder, **options).train(resume_from_checkpoint=True)
        assert difference(tmp_path / "whole" / "stage-1", folder / "stage-1") == 0


def test_a_temporary_head_does_not_depend_on_what_was_evaluated_before(make_trainer, tmp_path, eval_tasks):
    options = RUNS["progfed"] | {"eval_dataset": eval_tasks, "eval_strategy": "steps", "eval_steps": 1}
    resume_after_stages(make_trainer, tmp_path, **options)
    for stage in (1, 2):
        folders = [tmp_path / run / "stage-3" for run in ("whole", f"resumed-{stage}")]
        assert difference(*folders) == 0
