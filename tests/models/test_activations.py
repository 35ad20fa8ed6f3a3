from itertools import product
from weakref import WeakSet

import pytest
import torch
from accelerate import init_empty_weights
from conftest import lora
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_devft.models.activations import activations
from hf_devft.models.adapter import new_adapter


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 3
GEMMA = Gemma3TextConfig(
    num_hidden_layers=9, layer_types=KINDS, num_key_value_heads=1, head_dim=8, sliding_window=4, **SIZES
)
T5_SIZES = T5Config(
    d_model=16,
    d_ff=32,
    d_kv=8,
    num_heads=2,
    num_layers=5,
    num_decoder_layers=4,
    vocab_size=64,
    decoder_start_token_id=0,
)
DEEP = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **SIZES)),
    "layers of two kinds": lambda: Gemma3ForCausalLM(GEMMA),
    "encoder and decoder": lambda: T5ForConditionalGeneration(T5_SIZES),
}
ADAPTERS = {
    "everywhere": {},
    "on the last": {"layers_to_transform": [3, 4, 5]},
    "here and there": {"layers_to_transform": [1, 2, 4], "rank_pattern": {"layers.4": 5}},
    "and in the embeddings": {"layers_to_transform": [2, 3], "modules_to_save": ["embed_tokens"]},
}


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


def kept_by_all_layers(model, rows, length):
    """With the gradient of the largest."""
    holders = WeakSet()

    def pack(tensor):
        holders.add(holder := Holder(tensor))
        return holder

    tokens = torch.zeros(rows, length, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True), saved_tensors_hooks(pack, lambda holder: holder.tensor):
        model = model.to_empty(device="cpu").train()
        ours = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        storages = [holder.tensor.untyped_storage() for holder in holders]
        sizes = {storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in ours}
        del output
    return sum(sizes.values()) + max(sizes.values())


@pytest.mark.parametrize(
    ("name", "adapter"),
    [pair for pair in product(DEEP, ADAPTERS) if pair != ("encoder and decoder", "and in the embeddings")],
)
def test_two_layers_of_a_kind_tell_what_all_keep(name, adapter):
    targets = ["q", "wo"] if name == "encoder and decoder" else ["q_proj", "down_proj"]
    with init_empty_weights():
        model = new_adapter(DEEP[name](), lora(target_modules=targets, **ADAPTERS[adapter])).get_base_model()
    planned, lengths = activations(model, 3, 8)
    assert planned == kept_by_all_layers(model, 3, 8)
    assert lengths == [8] * (2 if model.config.is_encoder_decoder else 1)


def test_layers_that_are_left_out_at_random_are_planned():
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32}
    planned = []
    for rate in (0.0, 0.5):
        drops = {"encoder_layerdrop": rate, "decoder_layerdrop": rate}
        config = BartConfig(encoder_layers=4, decoder_layers=4, decoder_ffn_dim=32, vocab_size=64, **sizes, **drops)
        with init_empty_weights():
            model = new_adapter(BartForConditionalGeneration(config), lora(target_modules=["q_proj"])).get_base_model()
        planned.append(activations(model, 2, 8))
    assert planned[0] == planned[1]


def test_checkpointing_keeps_nothing_below_the_lowest_adapter():
    model = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=256, num_hidden_layers=8)
    kept = []
    for lowest in (0, 4, 6):
        with init_empty_weights():
            adapter = lora(target_modules=["q_proj"], layers_to_transform=list(range(lowest, 8)))
            adapted = new_adapter(LlamaForCausalLM(model), adapter).get_base_model()
        kept.append(activations(adapted, 4, 512, checkpointing=True)[0])
    layer_input = 4 * 512 * 64 * 4
    assert [(kept[0] - each) / layer_input for each in kept[1:]] == [4, 6]


def test_a_mixture_is_planned_in_any_type():
    """Though torch knows no other than bfloat16 of its experts where there is no memory."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=4, **sizes)
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):
        with init_empty_weights():
            model = new_adapter(MixtralForCausalLM(config).to(dtype), lora(target_modules=["q_proj"])).get_base_model()
        kept[dtype], _ = activations(model, 2, 16)
        assert kept[dtype] > 2 * 16 * 32 * dtype.itemsize * 4
    assert kept[torch.float32] == 2 * kept[torch.bfloat16]
