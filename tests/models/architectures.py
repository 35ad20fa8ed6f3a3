"""Tiny random models of every decoder-only architecture that stages promise to work on."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed


_COMMON = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 4}
ARCHITECTURES = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": _ALTERNATING,
    "gemma3_text": _ALTERNATING,
    "gpt2": {
        "n_embd": 16,
        "n_head": 2,
        "n_inner": 32,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
}


def tiny_model(name: str, layers: int = 6) -> torch.nn.Module:
    options = dict(ARCHITECTURES[name])
    model_type = options.pop("model_type", name)
    common = {k: v for k, v in _COMMON.items() if model_type != "gpt2" or not k.startswith(("hidden", "num", "inter"))}
    if "layer_types" in options:
        options["layer_types"] = options["layer_types"][:layers]
    config = CONFIG_MAPPING[model_type](
        **common | {"num_hidden_layers": layers, "initializer_range": 0.3, "attn_implementation": "eager"} | options
    )
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases that tell layers apart
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model
