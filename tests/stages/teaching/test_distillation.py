from contextlib import nullcontext

import pytest
import torch
from conftest import lora, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from hf_devft.stages.teaching import distillation
from hf_devft.stages.teaching.distillation import distil, divergence


@given(st.integers(0, 10**6), st.sampled_from([(3, 5), (2, 3, 5)]))
def test_divergence_is_that_of_the_distributions(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, *shape, generator=generator)
    p, q = teacher.softmax(-1), student.softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "_CHUNK", 4)  # so that there are several
        torch.testing.assert_close(divergence(teacher, student), (p * (p / q).log()).sum(-1).mean())
    assert divergence(teacher, teacher).abs() < 1e-6


def test_positions_of_padding_do_not_count():
    teacher, student = torch.randn(2, 2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    other = student.clone()
    other[mask == 0] += torch.randn(3, 5)
    assert torch.equal(divergence(teacher, student, mask), divergence(teacher, other, mask))
    # Of a classifier, whose logits are of rows.
    assert torch.equal(divergence(teacher[:, 0], student[:, 0], mask), divergence(teacher[:, 0], student[:, 0]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_student_learns_the_teachers_answers(dropout):
    teacher = get_peft_model(tiny_llama(layers=2), lora(init_lora_weights=False)).requires_grad_(False)
    student = get_peft_model(tiny_llama(layers=2), lora(r=8, lora_alpha=16, lora_dropout=dropout))
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    inputs = {"input_ids": torch.arange(5, 45).view(4, 10), "attention_mask": torch.ones(4, 10)}

    def distance() -> float:
        with torch.no_grad():
            return divergence(teacher(**inputs).logits, student.eval()(**inputs).logits).item()

    untrained = distance()
    assert distil(teacher, student, [inputs] * 60, 60, 0.03, nullcontext) == 60 * 40
    assert distance() < 0.3 * untrained
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, "the adapter alone"
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module._forward_pre_hooks for module in student.modules()), "nothing is left behind"
