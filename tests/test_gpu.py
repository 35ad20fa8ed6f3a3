"""What a GPU must do as a CPU does: run where there is one, and on the CPU, which shows that the tests themselves are
right."""

import warnings

import pytest
import torch
from conftest import lora, tiny_llama
from peft import get_peft_model

from hf_devft.models.counted_logits import count_logits
from hf_devft.tasks.data import IGNORED


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def batch(device):
    ids = torch.randint(5, 2048, (4, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :16] = IGNORED
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "labels": labels.to(device),
    }


def adapted(device, counted=True):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), lora(init_lora_weights=False)).to(device).train()
    if counted:
        count_logits(model.get_base_model())
    return model


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_of_counted_logits_is_the_cpus(device):
    expected, own = adapted("cpu", counted=False), adapted(device)
    losses = [model(**batch(where)).loss for model, where in ((expected, "cpu"), (own, device))]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=1e-5)
    for (name, parameter), other in zip(own.named_parameters(), expected.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad.cpu(), other.grad, rtol=1e-3, atol=1e-5, msg=name)


@needs_gpu
def test_a_step_waits_for_the_gpu_once():
    """To know how many labels count, before the forward pass; the rest is queued."""
    model, inputs = adapted("cuda"), batch("cuda")
    model(**inputs).loss.backward()  # what is done once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchroniz" in str(warning.message)]) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"clients_per_batch": 2}], ids=["fp32", "bf16", "together"])
def test_stages_end_near_where_they_end_on_a_cpu(make_trainer, tmp_path, device, options):
    common = {"stage_rounds": [1], "clients_per_round": 2, "learning_rate": 1e-3}
    there = make_trainer(output_dir=tmp_path / "there", use_cpu=device == "cpu", **common, **options)
    there.train()
    here = make_trainer(output_dir=tmp_path / "here", **common)
    here.train()
    assert there.args.device.type == device
    start = make_trainer(output_dir=tmp_path / "start", **common).run.adapter.state
    ends = [
        torch.cat([(trainer.run.adapter.state[key].cpu() - value).flatten() for key, value in start.items()])
        for trainer in (here, there)
    ]
    apart = (ends[1] - ends[0]).norm() / ends[0].norm()
    assert apart < (0.5 if options.get("bf16") else 0.1), "of what was learned"
