"""What version 0.1 has written: `version_0_1/` holds a checkpoint, a finished stage's folder and the end of a run with
FedSA-LoRA and a lossy wire, whose option had another name then."""

import json
from pathlib import Path

import pytest
import torch
from conftest import lora, tiny_llama
from safetensors.torch import load_file

from hf_devft import load_submodel


WRITTEN = Path(__file__).with_name("version_0_1")
OPTIONS = {
    "federated_method": "fedsa_lora", "wire_dtype": "int8", "upload_fraction": 0.5, "stage_rounds": [3],
    "eval_strategy": "steps", "eval_steps": 1, "peft_config": lora(r=1, target_modules=["q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("point", ["checkpoint-5", "stage-1"])
def test_a_run_goes_on(make_trainer, eval_tasks, point):
    trainer = make_trainer(eval_dataset=eval_tasks, **OPTIONS)
    trainer.train(resume_from_checkpoint=str(WRITTEN / point))
    end = load_file(WRITTEN / "final" / "adapter_model.safetensors")
    torch.testing.assert_close(trainer.run.adapter.state, end)
    record = json.loads((WRITTEN / "final" / "stage_config.json").read_text())
    found = trainer.stages[1]
    assert found.groups == record["groups"]
    for name in ("eval_loss", "eval_full_loss"):
        assert found.metrics[name] == pytest.approx(record["metrics"][name], rel=1e-5)
        assert trainer.stages[0].metrics[name] > 0, "the first stage's are known from the folder"
    assert trainer.run.start_metrics["eval_full_loss"] > 0


def test_a_submodel_is_loaded():
    model = load_submodel(tiny_llama(), WRITTEN, stage=1)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert model.config.num_hidden_layers == 2
