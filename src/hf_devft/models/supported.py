"""Which of PEFT's adapters stages can carry from depth to depth."""

import re

from peft import LoraConfig, PeftConfig, PeftType

from hf_devft.models.initialisation import moves_weights


# Initialisations of LoRA that look at nothing but the layer's own weights.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "olora", "pissa")


def check_adapter(config: PeftConfig, new: bool = False) -> None:
    """Refuse adapters that stages cannot carry from depth to depth.

    Args:
        new: whether it is to be made, or just made; some initialisations change the base.

    Raises:
        ValueError: neither LoRA nor IA3, trained biases, or options that name single layers or change the base.
    """
    if config.peft_type == PeftType.IA3:
        return
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise ValueError(
            f"{type(config).__name__} is not supported: stages carry what belongs to a layer from layer to layer; "
            "pass a `peft.LoraConfig` or a `peft.IA3Config`."
        )
    if type(config.r) is not int or config.r < 1 or not isinstance(config.lora_alpha, (int, float)):
        raise ValueError(
            f"LoraConfig(r={config.r!r}, lora_alpha={config.lora_alpha!r}) has no rank or no scale: give a rank of 1 "
            "or more, and a number."
        )
    init = config.init_lora_weights
    if init not in _INITIALISATIONS and not re.fullmatch(r"pissa_niter_\d+", str(init)):
        raise ValueError(
            f"LoraConfig(init_lora_weights={init!r}) is not supported: choose one of {_INITIALISATIONS} or "
            "'pissa_niter_[number]' (those that look at data, or at how weights are quantised, do not fit submodels)."
        )
    if moves_weights(config) and not new:
        raise ValueError(
            f"this adapter belongs to a base that init_lora_weights={init!r} has changed: pass the plain base with "
            "`peft_config`, and save adapters with `path_initial_model_for_weight_conversion`."
        )
    if config.bias != "none":
        raise ValueError(f'LoraConfig(bias="{config.bias}") trains parameters of the base: use bias="none".')
    if given := [name for name in ("layer_replication", "trainable_token_indices") if getattr(config, name, None)]:
        raise ValueError(f"LoraConfig({', '.join(given)}) is not supported: leave it out.")
    patterns = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    if numbered := [pattern for pattern in patterns if re.search(r"\d", pattern)]:
        raise ValueError(
            f"rank_pattern or alpha_pattern names single layers ({', '.join(numbered)}), which stages renumber: name "
            "modules only, such as 'q_proj'."
        )


def uneven_options(config: PeftConfig) -> list[str]:
    """Those that are set of the options by which an adapter is not LoRA of one rank and scale everywhere."""
    options = ("rank_pattern", "alpha_pattern", "use_dora", "target_parameters")
    return [option for option in options if getattr(config, option)]
