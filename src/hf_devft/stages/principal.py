"""Initialisations of LoRA that move a part of the base's weights into the adapter: W = W' + s·B₀A₀.

PiSSA (Meng et al. 2024, arXiv 2404.02948, §3) moves the principal components, OLoRA (Büyükakyüz 2024, arXiv
2406.01775) an orthonormal basis of the weights. PEFT does both, and leaves W' in the model.
"""

import copy
import math

import torch
from peft import LoraConfig, PeftConfig

from hf_devft.layout import State


def moves_weights(config: PeftConfig) -> bool:
    """Whether a new adapter of `config` changes its base."""
    return str(getattr(config, "init_lora_weights", True)).startswith(("pissa", "olora"))


def as_initialised(config: PeftConfig) -> PeftConfig:
    """The config of an adapter whose tensors are there: a copy that leaves the base as it is."""
    config = copy.deepcopy(config)
    if moves_weights(config):
        config.init_lora_weights = True
    return config


def on_whole_weights(config: LoraConfig, state: State, initial: State) -> tuple[LoraConfig, State]:
    """The adapter that does on W what `state` does on W': s·[B, −B₀][A; A₀], of twice the rank and the same scale s.

    Its front half is `state`. What is not LoRA's stays.
    """
    config = as_initialised(config)
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    return config, {key: _beside(key, tensor, initial) for key, tensor in state.items()}


def _beside(key: str, tensor: torch.Tensor, initial: State) -> torch.Tensor:
    if ".lora_A." in key:
        return torch.cat([tensor, initial[key].to(tensor)])
    if ".lora_B." in key:
        return torch.cat([tensor, -initial[key].to(tensor)], dim=1)
    return tensor
