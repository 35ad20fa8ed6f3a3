"""Where layers grow, the larger submodel is taught what the smaller one answers; for healing `test_healed_runs.py`."""

from pathlib import Path

import pytest
import torch
from conftest import ANCHORS, config, lora, resume_after_stages
from datasets import Dataset
from peft import LoraConfig
from test_mixin import assert_equal, final_adapter
from test_models import ENCODER
from transformers import BertConfig, BertForSequenceClassification

from hf_devft import DevFTTrainer
from hf_devft.embedded import task_dataset
from hf_devft.stages.teaching.distillation import divergence
from hf_devft.trainer.server_teacher import ServerTeacher


@pytest.fixture
def distances(monkeypatch) -> list[float]:
    """How far a larger submodel is from the smaller one before it, untaught and taught."""
    found, distil, ids = [], ServerTeacher.distil, torch.tensor([[5, 6, 7, 8, 9]])

    @torch.no_grad()
    def note(smaller, student):
        found.append(divergence(smaller.eval()(ids).logits, student.eval()(ids).logits).item())

    def watched(self, record, smaller, student):
        note(smaller, student)
        flops = distil(self, record, smaller, student)
        note(smaller, student)
        return flops

    monkeypatch.setattr(ServerTeacher, "distil", watched)
    return found


@pytest.mark.parametrize("rules", [{}, ANCHORS | {"peft_config": lora(init_lora_weights="pissa")}])
def test_a_larger_submodel_starts_from_what_the_smaller_one_answers(make_trainer, distances, rules):
    trainer = make_trainer(distillation_steps=30, generation_max_new_tokens=8, **rules)
    trainer.train()
    untaught, taught = distances
    assert taught < 0.9 * untaught
    first, second = (stage.totals for stage in trainer.stages)
    assert first["setup_flops"] == 0 < second["setup_flops"]
    assert trainer.ledger.flops == first["flops"] + second["flops"], "the clients' alone"
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "30 steps of distillation" in card
    assert "| server TFLOPs |" in card


@pytest.mark.parametrize("option", ["healing_steps", "distillation_steps"])
def test_of_prompts_no_answer_is_read(make_trainer, option):
    rows = task_dataset(8, seed=1)
    adapters = []
    for completion in (rows["completion"][:], [" something else"] * 8):
        told = rows.remove_columns("completion").add_column("completion", completion)
        trainer = make_trainer(**{option: 2}, generation_max_new_tokens=4, calibration_dataset=told)
        trainer.train()
        adapters.append(final_adapter(trainer))
    assert_equal(*adapters)


def test_texts_without_prompts_are_read_as_they_are(make_trainer, distances):
    rows = Dataset.from_dict({"text": [" ".join(words) for words in zip("abcdefgh", "ijklmnop", strict=True)]})
    trainer = make_trainer(distillation_steps=30, calibration_dataset=rows)
    trainer.train()
    assert distances[1] < distances[0]


@pytest.mark.parametrize("transfer", ["broadcast", "anchor"])
def test_it_is_done_again_where_a_run_goes_on_after_a_stage(make_trainer, tmp_path, transfer):
    whole, resumed = resume_after_stages(
        make_trainer, tmp_path, stage_rounds=[1], transfer=transfer, distillation_steps=2,
        generation_max_new_tokens=4, peft_config=lora(lora_dropout=0.3),
    )  # fmt: skip
    for trainer in resumed.values():
        assert_equal(final_adapter(trainer), final_adapter(whole))


def test_a_run_that_goes_on_within_a_stage_knows_what_was_spent(make_trainer, tmp_path):
    options = {"distillation_steps": 2, "generation_max_new_tokens": 4, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.stages[1].totals["setup_flops"] == whole.stages[1].totals["setup_flops"] > 0
    with pytest.raises(ValueError, match=r"distillation \[2, 32, 4\] \(now \[2, 32, 5\]\)"):
        make_trainer(**options | {"generation_max_new_tokens": 5}).train(resume_from_checkpoint=True)


def test_questions_and_answers_fit_into_the_longest_text(make_trainer):
    lengths = []

    class Noting(DevFTTrainer):
        def server_batches(self, *args):
            for inputs in super().server_batches(*args):
                lengths.append(inputs["input_ids"].shape[1])
                yield inputs

    make_trainer(cls=Noting, distillation_steps=2, generation_max_new_tokens=8, max_length=20).train()
    assert len(lengths) == 2
    assert max(lengths) <= 24, "padded to a multiple of 8"


def test_rows_need_no_answer(make_trainer, tmp_path, tasks, tokenizer):
    make_trainer(distillation_steps=1, calibration_dataset=tasks.select(range(4)).select_columns("prompt"))
    rows = Dataset.from_dict({"text": ["a", "b", "c", "d"] * 4, "label": [0, 1] * 8})
    trainer = DevFTTrainer(
        BertForSequenceClassification(BertConfig(**ENCODER | {"vocab_size": len(tokenizer)})),
        config(tmp_path, distillation_steps=2, stage_rounds=[1]),
        peft_config=LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        train_dataset=rows,
        calibration_dataset=rows.remove_columns("label"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.stages[1].totals["setup_flops"] > 0


@pytest.mark.parametrize("odd", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_heads_that_choose_no_class_are_refused(tmp_path, odd):
    rows = Dataset.from_dict({"input_ids": [[5, 6]] * 8, "labels": [0.5] * 8})
    model = BertForSequenceClassification(BertConfig(**ENCODER, **odd))
    with pytest.raises(ValueError, match="classes of which one is right"):
        DevFTTrainer(
            model,
            config(tmp_path, distillation_steps=2),
            peft_config=LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
            train_dataset=rows,
            calibration_dataset=rows,
        )


def test_bfloat16_is_that_of_training(make_trainer, monkeypatch):
    seen = set()
    original = torch.nn.Linear.forward

    def forward(self, inputs):
        output = original(self, inputs)
        seen.add(output.dtype)
        return output

    distil = ServerTeacher.distil

    def watched(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", forward)
            return distil(*args)

    monkeypatch.setattr(ServerTeacher, "distil", watched)
    make_trainer(distillation_steps=2, generation_max_new_tokens=2, bf16=True).train()
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(("options", "message"), [
    ({"calibration_dataset": None}, "pass `calibration_dataset`"),
    ({"calibration_dataset": {"one": task_dataset(4)}}, "one dataset"),
    ({"calibration_dataset": Dataset.from_dict({"input_ids": [[5, 6]]})}, "where a prompt ends"),
    ({"stage_layers": [4]}, "a single stage"),
    ({"generation_max_new_tokens": 64, "max_length": 64}, "lower generation_max_new_tokens"),
    ({"transfer": "split"}, 'set transfer="broadcast" or "anchor"'),
    ({"temporary_head": True}, "leave it out"),
    ({"distillation_steps": -1}, "give 0 or more"),
    ({"federated_method": "ffa_lora"}, "leave one out"),
    ({"federated_method": "fedsa_lora"}, "leave one out"),
    ({"federated_method": "flora"}, "leave one out"),
    ({"federated_method": "c2a"}, "leave one out"),
])  # fmt: skip
def test_what_it_cannot_be_joined_with_is_said_first(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{"distillation_steps": 2} | options)
