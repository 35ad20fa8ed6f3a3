"""Layers of a submodel are taught to stand for the whole base before anything is learned on them."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import lora, tiny_llama
from datasets import Dataset
from test_loading import submodel_loss
from test_mixin import assert_equal, final_adapter

from hf_devft import load_submodel
from hf_devft.embedded import task_dataset
from hf_devft.models.layer_files import healed_path, read_healed
from hf_devft.stages.teaching.distillation import divergence
from hf_devft.trainer import server_teacher
from hf_devft.trainer.server_teacher import ServerTeacher


BRIDGED = {"grouping": "bridged", "fusion": "bridge", "transfer": "anchor"}
OPTIONS = {"healing_steps": 20, "healing_learning_rate": 1e-2, "generation_max_new_tokens": 4}


@pytest.fixture
def distances(monkeypatch) -> list[list[float]]:
    """How far submodels are from the whole base, unhealed and healed."""
    found, heal = [], ServerTeacher.stand_for_base

    def watched(self, record, builder, submodel, layers):
        plain = builder.build(record.groups, record.fusion, record.fusion_beta)
        flops = heal(self, record, builder, submodel, layers)
        ids = torch.tensor([self.rows[0]["input_ids"]])
        with torch.no_grad():
            said = builder.whole().eval()(ids).logits
            found.append([divergence(said, model.eval()(ids).logits).item() for model in (plain, submodel)])
        return flops

    monkeypatch.setattr(ServerTeacher, "stand_for_base", watched)
    return found


@pytest.mark.parametrize("rules", [{"fusion": "anchor"}, {"fusion": "differential"}, BRIDGED])
def test_a_submodel_says_what_the_base_says(make_trainer, distances, rules):
    trainer = make_trainer(**OPTIONS | {"healing_steps": 100} | rules)
    trainer.train()
    ((plain, healed),) = distances  # at full depth all layers are the base's own
    assert healed < 0.8 * plain
    first, second = (stage.totals for stage in trainer.stages)
    assert first["setup_flops"] > 0 == second["setup_flops"]
    assert trainer.ledger.flops == first["flops"] + second["flops"], "the clients' alone"
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "healed in 100 steps" in card
    assert "| server TFLOPs |" in card


@pytest.mark.parametrize("options", [OPTIONS, BRIDGED, OPTIONS | BRIDGED], ids=["healed", "bridged", "both"])
def test_the_taught_submodel_is_the_one_that_was_trained(make_trainer, eval_tasks, tokenizer, tmp_path, options):
    trainer = make_trainer(eval_dataset=eval_tasks, eval_strategy="epoch", **options)
    trainer.train()
    run = Path(trainer.args.output_dir)
    model = load_submodel(tiny_llama(), run, stage=1)
    loss = submodel_loss(model, eval_tasks, tokenizer, tmp_path, make_trainer)
    assert loss == pytest.approx(trainer.stages[0].metrics["eval_loss"], rel=1e-6)
    assert not list((run / "stage-2").rglob("healed*"))
    healed_path(run / "stage-1" / "submodel", 1).unlink()
    with pytest.raises(ValueError, match="was healed or bridged"):
        load_submodel(tiny_llama(), run, stage=1)


@pytest.mark.parametrize(
    ("point", "known"), [("checkpoint-1", 1), ("checkpoint-3", 2), ("stage-1", 1), ("stage-2", 2)]
)
def test_a_run_that_goes_on_has_the_layers_that_it_had(make_trainer, tmp_path, point, known):
    """Elsewhere, with nothing but the folder that it goes on from, and once more from there."""
    options = OPTIONS | {
        "stage_layers": [1, 2, 4], "distillation_steps": 2, "client_max_layers": [1, 4],
        "beyond_capacity": "keep_last", "save_strategy": "steps", "save_steps": 1,
        "peft_config": lora(lora_dropout=0.3),
    }  # fmt: skip
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    folder = Path(shutil.move(tmp_path / "whole" / point, tmp_path / "moved" / point))
    texts = task_dataset(8, seed=7)  # that other layers would be healed on
    resumed = make_trainer(output_dir=tmp_path / "resumed", **options, calibration_dataset=texts)
    resumed.train(resume_from_checkpoint=str(folder))
    for stage in (1, 2):
        at = (healed_path(tmp_path / run / "stage-3" / "submodel", stage) for run in ("whole", "resumed"))
        before, after = map(read_healed, at)
        assert all(torch.equal(before[name], after[name]) for name in before) == (stage <= known)
    if known == 2:
        healed_path(folder / "submodel", 1).unlink()
        with pytest.raises(ValueError, match="lacks the healed layers or bridges of stage 1"):
            make_trainer(output_dir=tmp_path / "lacking", **options).train(resume_from_checkpoint=str(folder))


def test_a_new_run_takes_nothing_of_an_old_one(make_trainer):
    first = make_trainer(**OPTIONS)
    first.train()
    adapter, spent = final_adapter(first), first.stages[0].totals["setup_flops"]
    healed_path(Path(first.args.output_dir, ".healed"), 1).write_bytes(b"of something else")
    second = make_trainer(**OPTIONS)
    second.train()
    assert_equal(adapter, final_adapter(second))
    second.train()
    assert second.stages[0].totals["setup_flops"] == pytest.approx(spent, rel=0.2), "once"


def test_the_base_answers_once(make_trainer, monkeypatch):
    asked = []
    original = server_teacher.continuations
    monkeypatch.setattr(server_teacher, "continuations", lambda *args: asked.append(args) or original(*args))
    trainer = make_trainer(**OPTIONS | {"healing_steps": 1, "stage_layers": [1, 2, 4], "stage_rounds": [1]})
    trainer.train()
    assert len(asked) == 1
    first, second, _ = (stage.totals["setup_flops"] for stage in trainer.stages)
    assert first > second > 0


@pytest.mark.parametrize("options", [OPTIONS, BRIDGED], ids=["healed", "bridged"])
def test_it_goes_with_a_base_that_is_read_layer_by_layer(make_trainer, tmp_path, options):
    tiny_llama().save_pretrained(tmp_path / "base")
    adapters = []
    for model in (str(tmp_path / "base"), tiny_llama()):
        trainer = make_trainer(model=model, output_dir=tmp_path / "run", **options)
        trainer.train()
        adapters.append(final_adapter(trainer))
    assert_equal(*adapters)


def test_a_base_in_half_precision_stays_that(make_trainer, distances):
    trainer = make_trainer(model=tiny_llama().to(torch.bfloat16), **OPTIONS)
    trainer.train()
    plain, healed = distances[0]
    assert healed < plain
    state = read_healed(healed_path(Path(trainer.args.output_dir, "stage-1", "submodel"), 1))
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("options", "message"), [
    ({"calibration_dataset": None}, "pass `calibration_dataset`"),
    ({"calibration_dataset": Dataset.from_dict({"input_ids": [[5, 6]]})}, "where a prompt ends"),
    ({"stage_layers": [4]}, "a single stage"),
    ({"generation_max_new_tokens": 64, "max_length": 64}, "lower generation_max_new_tokens"),
    ({"healing_steps": -1}, "give 0 or more"),
    ({"healing_learning_rate": 0.0}, "give a rate above 0"),
    ({"model": tiny_llama().to(torch.float16)}, "load the base in bfloat16"),
    ({"peft_config": lora(use_dora=True)}, "leave healing_steps out"),
    ({"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}, "load the base unquantised"),
])  # fmt: skip
def test_what_it_cannot_be_joined_with_is_said_first(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**OPTIONS | options)
