import json

import gguf
import pytest
import torch
from conftest import config, lora
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM, set_seed

from hf_devft import DevFTTrainer, compare_bases, load_submodel
from hf_devft.embedded import BASE_PATH
from hf_devft.models.gguf import check_unpacked, locate
from hf_devft.models.streaming import empty_base, load_base


LAYERS, WIDTH, HIDDEN, HEADS = 4, 32, 64, 2


def write_gguf(path, quantise: bool = False) -> LlamaForCausalLM:
    """Write a tiny Llama, with the embedded base's tokens, and return it as transformers has it."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=128,
            tie_word_embeddings=False, initializer_range=0.2,
        )
    )  # fmt: skip
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges_of(tokenizer))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = {key: value.detach() for key, value in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        for ours, theirs in names.items():
            value = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):  # llama.cpp has the halves of each head's rotation interleaved
                value = value.view(HEADS, 2, WIDTH // HEADS // 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
            tensors[f"blk.{layer}.{theirs}.weight"] = value
    for name, value in tensors.items():
        if quantise and value.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def merges_of(tokenizer) -> list[str]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def test_a_name_is_taken_apart():
    assert locate("a/b/c.gguf", {"dtype": "auto"}) == ("a/b", {"gguf_file": "c.gguf", "dtype": "auto"})
    assert locate("user/repository", {}) == ("user/repository", {})


@pytest.mark.parametrize("quantise", [False, True])
def test_its_weights_are_unpacked(tmp_path, quantise):
    path = tmp_path / "tiny.gguf"
    original = write_gguf(path, quantise)
    model = load_base(str(path))
    assert not getattr(model, "is_quantized", False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, found = original.eval()(ids).logits, model.eval()(ids).logits
    assert (found - expected).abs().mean() < (0.1 if quantise else 1e-5) * expected.std()
    assert empty_base(str(path)).config.num_hidden_layers == LAYERS


def test_a_run_on_a_file(tmp_path, tasks):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, quantise=True)
    args = config(tmp_path / "run", stage_rounds=[1])
    trainer = DevFTTrainer(str(path), args, peft_config=lora(), train_dataset=tasks)
    trainer.train()
    record = trainer.stages[0]
    assert record.base_model_name_or_path == str(path)
    assert load_submodel(str(path), args.output_dir, stage=1).config.num_hidden_layers == 2
    assert compare_bases(str(path), str(path)).overall == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert f'gguf_file="{path.name}"' in card


def test_a_model_that_transformers_has_unpacked(tmp_path, tasks, tokenizer):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, quantise=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    DevFTTrainer(model, config(tmp_path / "run"), peft_config=lora(), train_dataset=tasks, processing_class=tokenizer)
    model = load_base(str(path))
    model.hf_quantizer = type("Quantizer", (), {"quantization_config": GgufConfig()})()
    with pytest.raises(ValueError, match="dequantize=True"):
        check_unpacked(model)


def test_the_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_devft.models.gguf.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"hf-devft\[gguf\]"):
        load_base(str(tmp_path / "tiny.gguf"))
