"""Which of PEFT's adapters stages can carry from depth to depth."""

import re

from peft import LoraConfig, PeftConfig, PeftType

from hf_devft.configuration import DevFTConfig
from hf_devft.stages.principal import moves_weights


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
        raise ValueError(f"an adapter of rank {config.r!r} and alpha {config.lora_alpha!r} is none.")
    init = config.init_lora_weights
    if init not in _INITIALISATIONS and not re.fullmatch(r"pissa_niter_\d+", str(init)):
        raise ValueError(
            f"LoraConfig(init_lora_weights={init!r}) is none of {_INITIALISATIONS} and 'pissa_niter_[number]'; those "
            "that look at data or at how weights are quantised are not supported, as submodels do not share these."
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


def uneven_options(config: LoraConfig) -> list[str]:
    """Those that are set of the options by which an adapter is not LoRA of one rank and scale everywhere."""
    options = ("rank_pattern", "alpha_pattern", "use_dora", "target_parameters")
    return [option for option in options if getattr(config, option)]


def check_rules(config: PeftConfig, args: DevFTConfig) -> None:
    """Refuse adapters that do not go with the stages' rules; before one is made, as that may be much work.

    Raises:
        ValueError: DoRA, or an initialisation that changes the base, with rules that give a layer what belongs to
            others.
    """
    fused = {args.fusion, args.adapter_fusion} != {"anchor"}
    if getattr(config, "use_dora", False) and (fused or args.healing_steps):
        raise ValueError(
            "LoraConfig(use_dora=True) keeps the norms of a layer's weights, which fused and healed layers do not "
            'have: set fusion="anchor" and adapter_fusion="anchor", and leave out healing_steps.'
        )
    quantised = (args.model_init_kwargs or {}).get("quantization_config")
    if args.healing_steps and quantised:
        raise ValueError(
            f"healing_steps={args.healing_steps} trains all weights of the layers: use a base that is not quantised."
        )
    if not moves_weights(config):
        return
    init = f"init_lora_weights={config.init_lora_weights!r}"
    if {args.fusion, args.adapter_fusion, args.transfer} != {"anchor"}:
        raise ValueError(
            f"{init} moves a part of each layer's weights into its adapter, which belongs to no other layer: set "
            'fusion="anchor", adapter_fusion="anchor" and transfer="anchor".'
        )
    if args.grouping == "calibrated" or args.temporary_head:
        raise ValueError(f'{init} needs its adapter on every module: leave out "calibrated" and temporary_head.')
    if given := uneven_options(config):
        raise ValueError(f"{init} is saved as plain LoRA of one rank: leave out {', '.join(given)}.")
    if quantised:
        raise ValueError(f"{init} changes the base's weights: use a base that is not quantised.")
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise ValueError(f"{init} changes the base's weights, which are not whole under ZeRO-3: use ZeRO-2.")
