"""Layers of a submodel are taught to stand for the whole base before anything is learned on them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import lora, tiny_llama
from datasets import Dataset
from test_loading import submodel_loss
from test_methods_in_runs import weights
from test_trainer import assert_equal, final_adapter

from hf_devft import DevFTTrainer, load_submodel
from hf_devft.embedded import task_dataset
from hf_devft.stages.distillation import divergence
from hf_devft.stages.healing import HEALED
from hf_devft.stages.submodel import build_submodel, build_whole


OPTIONS = {"healing_steps": 20, "healing_learning_rate": 1e-2, "generation_max_new_tokens": 4}


class Watched(DevFTTrainer):
    """Notes how far submodels are from the whole base, unhealed and healed."""

    def _submodel(self, stage, base, stack):
        healed = super()._submodel(stage, base, stack)
        plain = build_submodel(base, stack, stage.groups, stage.fusion, stage.fusion_beta)
        ids = torch.tensor([self.calibration_dataset[0]["input_ids"]])
        with torch.no_grad():
            said = build_whole(base).eval()(ids).logits
            self.distances = getattr(self, "distances", []) + [
                [divergence(said, model.eval()(ids).logits).item() for model in (plain, healed)]
            ]
        return healed


@pytest.mark.parametrize("fusion", ["anchor", "differential"])
def test_a_submodel_says_what_the_base_says(make_trainer, fusion):
    trainer = make_trainer(cls=Watched, fusion=fusion, **OPTIONS | {"healing_steps": 100})
    trainer.train()
    (plain, healed), whole = trainer.distances
    assert healed < 0.8 * plain
    assert whole == [0, 0], "all layers are the base's own"
    first, second = (stage.totals for stage in trainer.stages)
    assert first["setup_flops"] > 0 == second["setup_flops"]
    assert trainer.ledger.flops == first["flops"] + second["flops"], "the clients' alone"
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "healed in 100 steps" in card
    assert "| server TFLOPs |" in card


def test_no_answer_is_read_of_prompts(make_trainer):
    rows = task_dataset(8, seed=1)
    adapters = []
    for completion in (rows["completion"][:], [" something else"] * 8):
        told = rows.remove_columns("completion").add_column("completion", completion)
        trainer = make_trainer(**OPTIONS | {"healing_steps": 2}, calibration_dataset=told)
        trainer.train()
        adapters.append(final_adapter(trainer))
    assert_equal(*adapters)


def test_the_healed_submodel_is_the_one_that_was_trained(make_trainer, eval_tasks, tokenizer, tmp_path):
    trainer = make_trainer(eval_dataset=eval_tasks, eval_strategy="epoch", **OPTIONS)
    trainer.train()
    run = Path(trainer.args.output_dir)
    model = load_submodel(tiny_llama(), run, stage=1)
    loss = submodel_loss(model, eval_tasks, tokenizer, tmp_path, make_trainer)
    assert loss == pytest.approx(trainer.stages[0].metrics["eval_loss"], rel=1e-6)
    assert not (run / "stage-2" / "submodel" / HEALED).exists()
    (run / "stage-1" / "submodel" / HEALED).unlink()
    with pytest.raises(ValueError, match="was healed"):
        load_submodel(tiny_llama(), run, stage=1)


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_goes_on_has_the_layers_that_it_had(make_trainer, tmp_path, kept):
    """And heals them again, alike, where they are gone."""
    options = OPTIONS | {
        "stage_layers": [1, 2, 4], "distillation_steps": 2, "client_max_layers": [1, 4],
        "beyond_capacity": "keep_last", "save_strategy": "steps", "save_steps": 1,
        "peft_config": lora(lora_dropout=0.3),
    }  # fmt: skip
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    for point in ("checkpoint-3", "stage-1", "stage-2"):
        copied = tmp_path / point
        shutil.copytree(tmp_path / "whole", copied)
        if not kept:
            shutil.rmtree(copied / ".healed")
        resumed = make_trainer(output_dir=tmp_path / f"resumed-{point}", **options)
        resumed.train(resume_from_checkpoint=str(copied / point))
        assert_equal(weights(Path(resumed.args.output_dir)), weights(tmp_path / "whole"))
    with pytest.raises(ValueError, match="healing"):
        make_trainer(**options | {"healing_steps": 3}).train(resume_from_checkpoint=str(tmp_path / "stage-1/stage-1"))


def test_a_new_run_takes_nothing_of_an_old_one(make_trainer):
    first = make_trainer(**OPTIONS)
    first.train()
    Path(first.args.output_dir, ".healed", "stage-1.safetensors").write_bytes(b"of something else")
    second = make_trainer(**OPTIONS)
    second.train()
    assert_equal(final_adapter(first), final_adapter(second))


def test_it_goes_with_a_base_that_is_read_layer_by_layer(make_trainer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    adapters = []
    for model in (str(tmp_path / "base"), tiny_llama()):
        trainer = make_trainer(model=model, output_dir=tmp_path / "run", **OPTIONS)
        trainer.train()
        adapters.append(final_adapter(trainer))
    assert_equal(*adapters)


def test_a_base_in_half_precision_stays_that(make_trainer):
    trainer = make_trainer(model=tiny_llama().to(torch.bfloat16), cls=Watched, **OPTIONS)
    trainer.train()
    plain, healed = trainer.distances[0]
    assert healed < plain
    path = Path(trainer.args.output_dir, "stage-1", "submodel", HEALED)
    assert json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])


@pytest.mark.parametrize(("options", "message"), [
    ({"calibration_dataset": None}, "pass `calibration_dataset`"),
    ({"calibration_dataset": Dataset.from_dict({"input_ids": [[5, 6]]})}, "where a prompt ends"),
    ({"stage_layers": [4]}, "but one stage"),
    ({"generation_max_new_tokens": 64, "max_length": 64}, "lower it"),
    ({"healing_steps": -1}, "give 0 or more"),
    ({"healing_learning_rate": 0.0}, "give a rate above 0"),
    ({"model": tiny_llama().to(torch.float16)}, "load the base in bfloat16"),
])  # fmt: skip
def test_what_it_cannot_be_joined_with_is_said_first(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**OPTIONS | options)
