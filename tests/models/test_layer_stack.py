import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_devft.models.layer_stack import LayerNames, find_layer_stack, with_layers, without_layers


INPUT = torch.tensor([[3, 9, 27, 5, 12, 40, 33, 21, 8, 17]])
KEPT = [0, 3, 4]


def hand_built(model, stack, kept):
    """A model of the kept layers made the plain way: a shorter config and a renamed state dict."""
    config = type(model.config).from_dict(model.config.to_dict())
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)
    built = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = {}
    for key, tensor in model.state_dict().items():
        if (parts := stack.names.split(key)) is None:
            state[key] = tensor
        elif parts[0] in kept:
            state[stack.names.join(kept.index(parts[0]), parts[1])] = tensor
    built.load_state_dict(state)
    return built


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


def test_the_stack_is_found_by_structure(model):
    stack = find_layer_stack(model)
    assert len(stack) == 6
    assert stack.names.layers(model) == stack.layers


@torch.no_grad()
def test_logits_equal_those_of_a_hand_built_model(model):
    stack = find_layer_stack(model)
    before = model(INPUT).logits
    submodel = with_layers(model, stack, KEPT)
    assert torch.equal(submodel(INPUT).logits, hand_built(model, stack, KEPT)(INPUT).logits)
    assert torch.equal(model(INPUT).logits, before), "the full model must not change"


@torch.no_grad()
def test_generation_with_cache_equals_generation_without(model):
    submodel = with_layers(model, find_layer_stack(model), KEPT)
    generate = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, plain = (submodel.generate(INPUT, use_cache=use_cache, **generate) for use_cache in (True, False))
    assert torch.equal(cached, plain)


def test_all_tensors_are_shared_and_ties_kept(model):
    stack = find_layer_stack(model)
    submodel = with_layers(model, stack, KEPT)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in own for parameter in submodel.parameters())
    head, embedding = submodel.get_output_embeddings(), submodel.get_input_embeddings()
    assert (head.weight is embedding.weight) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


def test_activation_checkpointing_gives_the_same_gradients(model):
    submodel = with_layers(model, find_layer_stack(model), KEPT).train()

    def gradients():
        submodel.zero_grad()
        submodel(input_ids=INPUT, labels=INPUT, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in submodel.named_parameters()}

    plain = gradients()
    submodel.activation_checkpointing_enable()
    assert submodel.is_activation_checkpointing
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_attention_kinds_and_per_layer_lists_follow_the_layers():
    model = tiny_model("gemma2")
    stack = find_layer_stack(model)
    assert len(set(stack.kinds)) == 2
    submodel = with_layers(model, stack, [0, 1, 3])
    assert submodel.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert submodel.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 6


def tiny_t5() -> T5ForConditionalGeneration:
    sizes = {"vocab_size": 32, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, num_layers=4, num_decoder_layers=3)).eval()


def test_layers_that_attend_otherwise_are_of_another_kind():
    neo = GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]]
    )
    kinds = find_layer_stack(GPTNeoForCausalLM(neo)).kinds
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]


def test_an_encoder_and_a_decoder_are_counted_through():
    stack = find_layer_stack(tiny_t5())
    assert stack.names.lists == {"encoder.block": 4, "decoder.block": 3}
    assert not set(stack.kinds[:4]) & set(stack.kinds[4:]), "layers of the two never share a group"
    assert len(set(stack.kinds)) == 4, "the first of each has the position bias"
    assert find_layer_stack(tiny_t5(), "decoder").names.lists == {"decoder.block": 3}


@torch.no_grad()
def test_both_are_shortened_and_a_cache_still_works():
    model = tiny_t5()
    shorter = with_layers(model, find_layer_stack(model), [0, 2, 4, 6])
    assert (shorter.config.num_layers, shorter.config.num_decoder_layers) == (2, 2)
    tokens = torch.tensor([[3, 9, 27, 5]])
    for layer, kept in zip(shorter.encoder.block, (0, 2), strict=True):
        assert layer.layer[0].SelfAttention.q.weight is model.encoder.block[kept].layer[0].SelfAttention.q.weight
    generate = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (shorter.generate(tokens, use_cache=use_cache, **generate) for use_cache in (True, False))
    assert torch.equal(cached, plain)


def test_a_model_of_one_stack_has_no_encoder_to_choose():
    with pytest.raises(ValueError, match="no encoder and decoder"):
        find_layer_stack(tiny_model("llama"), "encoder")


def test_layers_that_share_their_weights_are_refused():
    sizes = {"vocab_size": 32, "hidden_size": 8, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(ValueError, match="share their weights"):
        find_layer_stack(AlbertModel(AlbertConfig(**sizes, num_hidden_layers=3)))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=2), data=st.data())
def test_names_are_taken_apart_and_put_together(sizes, data):
    names = LayerNames(dict(zip(("model.encoder.layers", "model.decoder.layers"), sizes, strict=False)))
    kept = sorted(data.draw(st.sets(st.integers(0, len(names) - 1), min_size=1)))
    short = names.keeping(kept)
    assert len(short) == len(kept)
    rest = ("base_model.model.", ".fc1.lora_A.weight")
    for index, layer in enumerate(kept):
        full, own = names.join(layer, rest), short.join(index, rest)
        assert names.split(full) == (layer, rest)
        assert short.split(own) == (index, rest)
        assert full.partition("layers")[0] == own.partition("layers")[0], "no layer moves into the other list"


def test_layers_left_out_hand_on_what_they_are_given(model):
    stack = find_layer_stack(model)
    with torch.no_grad():
        before = model(input_ids=INPUT).logits
        with without_layers(stack.layers, [1, 2, 5]):
            left_out = model(input_ids=INPUT, use_cache=False).logits
        assert torch.equal(model(input_ids=INPUT).logits, before)
        kept = with_layers(model, stack, KEPT)(input_ids=INPUT, use_cache=False).logits
    torch.testing.assert_close(left_out, kept)


def test_types_that_a_config_computes_from_numbers_cannot_be_shortened():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    of_experts = {"num_key_value_heads": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    model = JambaForCausalLM(JambaConfig(**sizes, **of_experts, num_hidden_layers=6, use_mamba_kernels=False))
    stack = find_layer_stack(model)
    assert with_layers(model, stack, [0, 1, 4, 5]).config.num_hidden_layers == 4, "by chance they are the same"
    with pytest.raises(ValueError, match=r"JambaConfig computes .* set `adapter_layers` in place of `stage_layers`"):
        with_layers(model, stack, [0, 2, 3, 5])


def test_a_model_with_one_table_for_all_layers_keeps_all():
    sizes = {"vocab_size": 32, "vocab_size_per_layer_input": 32, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_size_per_layer_input": 4}
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **heads, num_hidden_layers=4, num_kv_shared_layers=0))
    with pytest.raises(ValueError, match=r"embeddings of each layer .* set `adapter_layers` in place of"):
        with_layers(model, find_layer_stack(model), [0, 2])


@torch.no_grad()
def test_a_cache_counts_layers_whatever_their_number_is_called():
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=6, num_heads=2, attention_types=[[["global", "local"], 3]]
    )
    model = GPTNeoForCausalLM(config).eval()
    short = with_layers(model, find_layer_stack(model), [0, 1, 3, 5])
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[3, 9, 27]])
    assert torch.equal(short.generate(ids, use_cache=True, **how), short.generate(ids, use_cache=False, **how))
