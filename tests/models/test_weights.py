"""On a real bitsandbytes 4-bit model, which runs on the CPU too."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, set_seed

from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.weights import dense, keep_readable, store_like
from hf_devft.stages.fusion import fuse
from hf_devft.stages.grouping import similarity_of, weight_gram
from hf_devft.stages.submodel import build_submodel


def wide_model() -> LlamaForCausalLM:
    """As wide as the CPU kernels of bitsandbytes want their blocks."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    wide_model().save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    keep_readable(model)
    return model


def test_values_survive_a_round_trip(quantised):
    weight = find_layer_stack(quantised).layers[0].mlp.up_proj.weight
    values = dense(weight)
    assert values.shape == (128, 64)
    again = store_like(values, weight)
    assert type(again) is type(weight)
    torch.testing.assert_close(dense(again), values, atol=1e-3, rtol=0.05)


def test_other_parameters_pass_through():
    parameter = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    assert dense(parameter) is parameter
    assert store_like(torch.zeros(2, 2), parameter).dtype == torch.bfloat16


def test_other_quantisations_are_refused():
    with pytest.raises(ValueError, match="4-bit"):
        dense(torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))


@torch.no_grad()
def test_a_group_is_dequantised_fused_and_quantised_again(quantised):
    stack = find_layer_stack(quantised)
    submodel = build_submodel(quantised, stack, [[0, 1], [2], [3, 4, 5]], "mean")
    weight = submodel.model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Params4bit"
    expected = fuse([dense(stack.layers[index].mlp.up_proj.weight) for index in (0, 1)], "mean")
    assert torch.equal(dense(weight), dense(store_like(expected, stack.layers[0].mlp.up_proj.weight)))
    error = (dense(weight) - expected).abs().mean() / expected.abs().mean()
    assert error < 0.3, "no more than 4 bits lose"
    assert torch.isfinite(submodel(torch.tensor([[3, 9, 27]])).logits).all()


def test_similarity_of_quantised_layers(quantised):
    with torch.no_grad():
        quantised.eval()(torch.tensor([[3, 9, 27]]))  # would repack the weights on some CPUs
    similarity = similarity_of(weight_gram(find_layer_stack(quantised)))
    plain = similarity_of(weight_gram(find_layer_stack(wide_model())))
    torch.testing.assert_close(similarity, plain, atol=0.05, rtol=0)
