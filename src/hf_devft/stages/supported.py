"""Which of PEFT's adapters stages can carry from depth to depth."""

import re

from peft import LoraConfig, PeftConfig, PeftType

from hf_devft.configuration import DevFTConfig
from hf_devft.layout import State
from hf_devft.stages.principal import moves_weights


# Initialisations of LoRA that look at nothing but the layer's own weights.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_[number]")


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
            f"LoraConfig(init_lora_weights={init!r}) looks at data or at how weights are quantised, which submodels "
            f"do not share: use one of {_INITIALISATIONS}."
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


def check_rules(config: PeftConfig, args: DevFTConfig, state: State, encoder_too: bool) -> None:
    """Refuse adapters that do not go with the stages' rules.

    Args:
        state: the adapter's tensors.
        encoder_too: whether stages shorten an encoder and a decoder together.

    Raises:
        ValueError: `layers_to_transform` for two stacks; DoRA, or an initialisation that changes the base, with rules
            that give a layer what belongs to others.
    """
    if getattr(config, "layers_to_transform", None) is not None and encoder_too:
        raise ValueError("layers_to_transform means layers of an encoder and of a decoder: choose one by `stack`.")
    if getattr(config, "use_dora", False) and {args.fusion, args.adapter_fusion} != {"anchor"}:
        raise ValueError(
            "LoraConfig(use_dora=True) keeps the norms of a layer's weights, which fused layers do not have: set "
            'fusion="anchor" and adapter_fusion="anchor".'
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
    if given := [name for name in ("rank_pattern", "alpha_pattern", "use_dora") if getattr(config, name)]:
        raise ValueError(f"{init} is saved as plain LoRA of one rank: leave out {', '.join(given)}.")
    if any("lora_embedding" in key for key in state):
        raise ValueError(f"{init} does not move embeddings: leave them out of `target_modules`.")
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise ValueError(f"{init} changes the base's weights, which are not whole under ZeRO-3: use ZeRO-2.")
