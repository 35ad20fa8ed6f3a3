"""Logits where labels count: the same loss and gradients as with all of them, for every decoder."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BartConfig,
    BartForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_devft.models import counted_logits
from hf_devft.models.counted_logits import count_logits
from hf_devft.tasks.data import IGNORED
from hf_devft.tasks.predictions import reduce_logits


@pytest.fixture(params=ARCHITECTURES)
def model(request, monkeypatch):
    monkeypatch.setattr(counted_logits, "_PIECE", 64 * 4)  # four tokens at a time
    return tiny_model(request.param)


def batch(rows: int = 4, length: int = 11) -> dict[str, torch.Tensor]:
    """Rows of prompts and completions of different lengths, and one without a label."""
    ids = torch.randint(5, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        labels[row, : 3 + row] = IGNORED
        labels[row, length - row :], mask[row, length - row :] = IGNORED, 0
    labels[-1] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_adapter(model, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(copy.deepcopy(model), config)


def loss_and_gradients(model, **inputs):
    loss = model.train()(**inputs).loss
    (2 * loss).backward()  # as loss scaling would
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trains_head", [False, True], ids=["adapter", "trained-head"])
@pytest.mark.parametrize("items", [None, torch.tensor(7)], ids=["mean", "num_items"])
def test_loss_and_gradients_are_those_of_all_logits(model, items, trains_head):
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    options = {"modules_to_save": names} if trains_head else {}
    every, counted = with_adapter(model, **options), with_adapter(model, **options)
    hooks = count_logits(counted.get_base_model())
    assert hooks
    inputs = batch() | ({} if items is None else {"num_items_in_batch": items})
    expected, gradients = loss_and_gradients(every, **inputs)
    loss, own = loss_and_gradients(counted, **inputs)
    torch.testing.assert_close(loss, expected)
    assert own.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(
            own[name], gradients[name], rtol=1e-4, atol=1e-4 * gradients[name].abs().max().item()
        )
    assert counted(**inputs).logits is None
    for hook in hooks:
        hook.remove()
    assert counted(**inputs).logits.shape == (4, 11, 64)


SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


def test_an_adapter_between_the_decoder_and_the_logits_learns():
    base = RobertaForCausalLM(RobertaConfig(**SMALL, is_decoder=True)).eval()
    every, counted = with_adapter(base), with_adapter(base)
    assert count_logits(counted.get_base_model())
    _, gradients = loss_and_gradients(every, **batch())
    _, own = loss_and_gradients(counted, **batch())
    assert any("lm_head.dense" in name for name in gradients)
    assert own.keys() == gradients.keys()


def test_a_model_without_its_source_counts_logits_too():
    """As one that was compiled, or made in a notebook."""
    there = {"Base": LlamaForCausalLM}
    exec("class Own(Base):\n    def forward(self, *a, labels=None, logits_to_keep=0, **k): self.loss_function", there)
    assert counted_logits.counts_logits(there["Own"](LlamaConfig(**SMALL)))


@pytest.mark.parametrize("other", ["Bart", "ModernBertDecoder", "Bamba"])
def test_a_model_whose_loss_or_decoder_is_another_computes_all_logits(other):
    """Bart's decoder does not shift labels; ModernBERT's calls its head so; Bamba can have another loss beside."""
    if other == "Bart":
        sizes = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 24, "decoder_attention_heads": 2}
        base = BartForCausalLM(BartConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    elif other == "ModernBertDecoder":
        base = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**SMALL, pad_token_id=0))
    else:
        with torch.device("meta"):
            base = BambaForCausalLM(BambaConfig(**SMALL, mamba_n_heads=2, mamba_d_head=16, z_loss_coefficient=0.1))
    assert count_logits(base) == []


def test_an_evaluation_has_what_the_metrics_read(model):
    inputs = batch()
    expected = model(**inputs)
    tokens, nll = reduce_logits(expected.logits, inputs["labels"])
    count_logits(model)
    with torch.no_grad():
        scored = model(**inputs)
    counts = inputs["labels"][:, 1:] != IGNORED
    torch.testing.assert_close(scored.loss, expected.loss)
    assert torch.equal(scored.predicted[counts], tokens[counts])
    torch.testing.assert_close(scored.nll, nll)
    assert reduce_logits((scored.predicted, scored.nll), inputs["labels"]) == (scored.predicted, scored.nll)


def test_no_more_than_a_piece_is_held(model):
    """Neither in training nor in evaluation do the output embeddings see more tokens at a time."""
    most = []
    model.requires_grad_(False)  # as a base is
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: most.append(args[0].shape[:-1].numel()))
    count_logits(model)
    inputs = batch()
    with_loss = model.train()(**inputs)
    with torch.no_grad():
        model.eval()(**inputs)
    assert max(most) == 4
    assert sum(most) == 2 * (inputs["labels"][:, 1:] != IGNORED).sum()
    assert torch.isfinite(with_loss.loss)


def test_without_labels_and_with_another_loss_there_are_all_logits(model):
    count_logits(model)
    inputs = batch()
    labels = inputs.pop("labels")
    assert model(**inputs).logits.shape == (4, 11, 64)
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape == (4, 13)
    model.loss_function = lambda logits, labels, *args, **kwargs: logits.sum()
    assert model(**inputs, labels=labels).logits.shape == (4, 11, 64)


def test_a_batch_without_labels_to_count_teaches_nothing(model):
    inputs = batch() | {"num_items_in_batch": torch.tensor(1)}
    inputs["labels"][:] = IGNORED
    adapted = with_adapter(model)
    count_logits(adapted.get_base_model())
    loss, gradients = loss_and_gradients(adapted, **inputs)
    assert loss == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


def test_a_pass_that_fails_leaves_nothing_behind(model):
    count_logits(model)
    inputs = batch()
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        model(input_ids=inputs["input_ids"] + 1000, labels=inputs["labels"])
    del inputs["labels"]
    assert model(**inputs).logits.shape == (4, 11, 64)


def test_what_is_no_usual_decoder_is_left_alone():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    assert count_logits(T5ForConditionalGeneration(T5Config(**sizes))) == []
    assert count_logits(nn.Identity()) == []


def test_large_logits_lose_no_small_loss():
    """The loss of a sure and right token is as small as the logits say, however large they are."""
    logits = torch.tensor([[1e4, 1e4 - 10, 0.0], [3.0, -2.0, 1.0]])
    targets = torch.tensor([0, 1])
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    found, _ = counted_logits._losses_into_exponentials(logits.clone(), targets)
    assert 0 < expected[0] < 1e-4
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)


def scaled(dtype):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(vocab_size=64, logits_scaling=0.3, pad_token_id=0, **sizes)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_logits_and_half_precision(dtype):
    """Where logits are not what the output embeddings give, and not what the loss is computed in."""
    every, counted = with_adapter(scaled(dtype)), with_adapter(scaled(dtype))
    count_logits(counted.get_base_model())
    expected, gradients = loss_and_gradients(every, **batch())
    loss, own = loss_and_gradients(counted, **batch())
    exact = dtype == torch.float32
    torch.testing.assert_close(loss.float(), expected.float(), rtol=1e-5 if exact else 0.01, atol=0)
    for name in gradients:
        size = gradients[name].abs().max().item()
        torch.testing.assert_close(own[name], gradients[name], rtol=0, atol=(1e-4 if exact else 0.05) * size)


def test_an_evaluation_without_labels_to_count_has_no_scores(model):
    inputs = batch()
    inputs["labels"][:] = IGNORED
    count_logits(model)
    scored = model(**inputs)
    assert scored.loss.isnan()  # as with all logits
    assert not scored.nll.any()
    assert scored.predicted.shape == (4, 10)
