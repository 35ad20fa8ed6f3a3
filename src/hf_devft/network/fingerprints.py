"""By what two machines know that they train the same submodel, on the same tokens."""

import hashlib
import json
from typing import Any

import torch

from hf_devft.trainer.active_stage import ActiveStage


# What tokenizers differ in: case, accents, spaces, digits, scripts, and signs beyond a vocabulary.
_PROBE = "Ünïcode, DON'T  fold:\n\t1234567890 (x != y) — 中文 हिन्दी 🤗"


def hash_of_weights(active: ActiveStage) -> str:
    """Return a hash of a stage's base weights, without its adapter: of their names, types, shapes and bytes."""
    digest, own = hashlib.sha256(), {id(parameter) for parameter in active.engine.parameters}
    for name, parameter in sorted(active.model.named_parameters()):
        if id(parameter) not in own:
            values = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_of_tokenizer(processor: Any) -> str:
    """Return a hash of what a tokenizer, or a processor's, makes of text: its vocabulary, its chat template, and the
    tokens of a probe. Not of its files, which versions of libraries write differently.

    Args:
        processor: `processing_class` of a trainer.

    Returns:
        "" where there is no tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "get_vocab"):
        return ""
    said = [sorted(tokenizer.get_vocab().items()), processor.chat_template, tokenizer(_PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
