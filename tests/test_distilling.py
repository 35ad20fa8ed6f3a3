"""Where the layers grow, the larger submodel is taught what the smaller one answers."""

from pathlib import Path

import pytest
import torch
from conftest import ANCHORS, lora
from datasets import Dataset
from test_methods_in_runs import weights
from test_trainer import assert_equal, final_adapter

from hf_devft import DevFTTrainer
from hf_devft.embedded import task_dataset
from hf_devft.stages.distillation import divergence


class Watched(DevFTTrainer):
    """Notes how far larger submodels are from the smaller ones before them, untaught and taught."""

    def _distil(self, stage, base, stack, student):
        teacher = self._submodel_of(self.stages[stage.stage - 2], base, stack, "anchor").eval()
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        self.distances = []

        def note():
            with torch.no_grad():
                self.distances.append(divergence(teacher(ids).logits, student.eval()(ids).logits).item())

        note()
        flops = super()._distil(stage, base, stack, student)
        note()
        return flops


@pytest.mark.parametrize("rules", [{}, ANCHORS | {"peft_config": lora(init_lora_weights="pissa")}])
def test_a_larger_submodel_starts_from_what_the_smaller_one_answers(make_trainer, rules):
    trainer = make_trainer(cls=Watched, distillation_steps=30, generation_max_new_tokens=8, **rules)
    trainer.train()
    untaught, taught = trainer.distances
    assert taught < 0.9 * untaught
    first, second = (stage.totals for stage in trainer.stages)
    assert first["setup_flops"] == 0 < second["setup_flops"]
    assert trainer.ledger.flops == first["flops"] + second["flops"], "the clients' alone"
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "30 steps of distillation" in card
    assert "| server TFLOPs |" in card


def test_of_prompts_no_answer_is_read(make_trainer):
    rows = task_dataset(8, seed=1)
    adapters = []
    for completion in (rows["completion"][:], [" something else"] * 8):
        told = rows.remove_columns("completion").add_column("completion", completion)
        trainer = make_trainer(distillation_steps=2, generation_max_new_tokens=4, calibration_dataset=told)
        trainer.train()
        adapters.append(final_adapter(trainer))
    assert_equal(*adapters)


def test_texts_without_prompts_are_read_as_they_are(make_trainer):
    rows = Dataset.from_dict({"text": [" ".join(words) for words in zip("abcdefgh", "ijklmnop", strict=True)]})
    trainer = make_trainer(cls=Watched, distillation_steps=30, calibration_dataset=rows)
    trainer.train()
    assert trainer.distances[1] < trainer.distances[0]


@pytest.mark.parametrize("transfer", ["broadcast", "anchor"])
@pytest.mark.parametrize("stage", [1, 2])
def test_it_is_done_again_where_a_run_goes_on_after_a_stage(make_trainer, tmp_path, stage, transfer):
    options = {
        "stage_layers": [2, 3, 4], "stage_rounds": [1], "transfer": transfer, "distillation_steps": 2,
        "generation_max_new_tokens": 4,
    }  # fmt: skip
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(output_dir=tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"stage-{stage}"))
    assert_equal(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("options", "message"), [
    ({"calibration_dataset": None}, "pass `calibration_dataset`"),
    ({"transfer": "split"}, 'set "broadcast" or "anchor"'),
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
