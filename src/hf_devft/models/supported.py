"""Which of PEFT's adapters stages can carry from depth to depth."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType

from hf_devft.models.initialisation import moves_weights


# Initialisations of LoRA that look at nothing but the layer's own weights.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "olora", "pissa")
# What a LoRA config may set. For the others PEFT trains more than LoRA, imports modules, reads files or renumbers
# layers.
_OPTIONS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_dora", "target_parameters",
}  # fmt: skip
_MOST_NAMES = 4096  # in one option; PEFT compares each with every module
_LARGEST_ALPHA = 1e6


def check_adapter(config: PeftConfig, new: bool = False) -> None:
    """Refuse adapters that stages cannot carry from depth to depth.

    Args:
        new: whether it is to be made, or just made; some initialisations change the base.

    Raises:
        ValueError: neither LoRA nor IA3, trained biases, options that name single layers or change the base, numbers
            out of range, or a pattern that may take forever.
    """
    _check_lengths(config)
    _check_names(config)
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
    if given := unknown_options(vars(config)):
        raise ValueError(f"LoraConfig({', '.join(given)}) is not supported: leave it out.")
    patterns = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    if numbered := [pattern for pattern in patterns if re.search(r"(?<!\w)\d", pattern)]:  # not fc1
        raise ValueError(
            f"rank_pattern or alpha_pattern names single layers ({', '.join(numbered)}), which stages renumber: name "
            "modules only, such as 'q_proj'."
        )
    _check_values(config)


def unknown_options(content: Mapping[str, Any]) -> list[str]:
    """Those that are set of the options of a LoRA config that stages cannot carry.

    Args:
        content: of the config, {name: value}.
    """
    default = LoraConfig()
    others = content.keys() - _OPTIONS
    return sorted(name for name in others if content[name] != getattr(default, name, content[name]))


def _check_lengths(config: PeftConfig) -> None:
    """Refuse lists of names that no adapter has."""
    names = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save",
             "target_parameters", "layers_to_transform")  # fmt: skip
    for name in names:
        value = getattr(config, name, None)
        if not isinstance(value, str | int | None) and len(value) > _MOST_NAMES:
            raise ValueError(f"{name} has {len(value)} entries, {_MOST_NAMES} at most are read.")


def _check_values(config: LoraConfig) -> None:
    """Refuse numbers and patterns that no adapter of a run has."""
    ranks, factors = config.rank_pattern or {}, config.alpha_pattern or {}
    alphas = [config.lora_alpha, *factors.values()]
    if wrong := [alpha for alpha in alphas if not _is_number(alpha) or not 0 < alpha <= _LARGEST_ALPHA]:
        raise ValueError(
            f"lora_alpha or an alpha_pattern is {wrong[0]!r}: give one above 0, up to {_LARGEST_ALPHA:g}."
        )
    if wrong := [rank for rank in ranks.values() if type(rank) is not int or rank < 1]:
        raise ValueError(f"a rank_pattern is {wrong[0]!r}: give a rank of 1 or more.")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"lora_dropout is {config.lora_dropout}: give 0 to below 1.")
    _check_patterns((*ranks, *factors, *_listed(config.layers_pattern)))


def _check_names(config: PeftConfig) -> None:
    """Refuse names of modules that PEFT takes for patterns, and that no module has."""
    feed_forward = getattr(config, "feedforward_modules", None)
    _check_patterns((
        *_listed(getattr(config, "modules_to_save", None)),
        *([feed_forward] if isinstance(feed_forward, str) else []),
    ))  # fmt: skip


def _check_patterns(patterns: Iterable[str]) -> None:
    if wrong := [pattern for pattern in patterns if not _is_harmless(pattern)]:
        raise ValueError(f"{wrong[0][:80]!r} is a pattern that may take forever: name modules only, such as 'q_proj'.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _is_harmless(pattern: str) -> bool:
    """Whether a regular expression takes few steps on any module's name: it is short, repeats two things at the most,
    and no group."""
    repeats = re.findall(r"[*+?{]", pattern)
    return (
        len(pattern) <= 200 and len(repeats) <= 2 and not re.search(r"[)\]*+?}][*+?{]", pattern) and _compiles(pattern)
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
