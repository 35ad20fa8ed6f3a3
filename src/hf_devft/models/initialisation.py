"""Initialisations of LoRA that move a part of the base's weights into the adapter: W = W' + s·B₀A₀.

PiSSA (Meng et al. 2024, arXiv 2404.02948, §3) moves the principal components, OLoRA (Büyükakyüz 2024, arXiv
2406.01775) an orthonormal basis of the weights. PEFT computes both. Here W' is in copies, and the base keeps its W.
"""

import copy
import math

import torch
from peft import PeftConfig, PeftModel

from hf_devft.models.layout import RESIDUAL, State, lora_scaling
from hf_devft.models.residual import PatchedBaseWeights


def moves_weights(config: PeftConfig) -> bool:
    """Whether a new adapter of `config` changes its base."""
    return str(getattr(config, "init_lora_weights", True)).startswith(("pissa", "olora"))


def without_weight_based_init(config: PeftConfig) -> PeftConfig:
    """A copy of an adapter's config, by which PEFT neither looks at the base's weights nor changes them."""
    config = copy.deepcopy(config)
    if moves_weights(config):
        config.init_lora_weights = True
    return config


def initialise(model: PeftModel, initialisation: str) -> PatchedBaseWeights:
    """Give a new adapter its initial values, and the modules under it W', in copies of their weights.

    Raises:
        ValueError: weights that have no such initialisation.
    """
    patched, name = PatchedBaseWeights(model), model.active_adapter
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        shape, rank = module.get_base_layer().weight.shape, module.r[name]
        if len(shape) != 2 or rank > min(shape):
            raise ValueError(
                f"init_lora_weights={initialisation!r} takes {rank} components out of a matrix, but {path} has one "
                f"of {tuple(shape)}: lower `r`, or leave it out of `target_modules`."
            )
        if initialisation.startswith("pissa"):
            module.pissa_init(name, initialisation)
        elif getattr(module, "fan_in_fan_out", False):
            raise ValueError(f"{path} keeps its weights transposed, which PEFT's OLoRA does not know: use PiSSA.")
        else:
            module.olora_init(name)
    return patched


def move_weights(model: PeftModel, config: PeftConfig, initial: State) -> None:
    """Give the modules under an adapter W', in copies of their weights."""
    patched, end = PatchedBaseWeights(model), ".lora_A.weight"
    for module in [key.removesuffix(end) for key in initial if key.endswith(end)]:
        product = initial[f"{module}.lora_B.weight"] @ initial[f"{module}{end}"]
        patched.set({module + RESIDUAL: -lora_scaling(config) * product})  # one at a time: they are dense


def on_whole_weights(config: PeftConfig, state: State, initial: State) -> tuple[PeftConfig, State]:
    """The adapter that does on W what `state` does on W': s·[B, −B₀][A; A₀], of twice the rank and the same scale s.

    Its front half is `state`. What is not LoRA's stays.
    """
    config = without_weight_based_init(config)
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    return config, {key: _stacked(key, tensor, initial) for key, tensor in state.items()}


def _stacked(key: str, tensor: torch.Tensor, initial: State) -> torch.Tensor:
    if ".lora_A." in key:
        return torch.cat([tensor, initial[key].to(tensor)])
    if ".lora_B." in key:
        return torch.cat([tensor, -initial[key].to(tensor)], dim=1)
    return tensor
