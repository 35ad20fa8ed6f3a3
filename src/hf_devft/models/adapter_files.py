"""Adapters as PEFT folders: save, load, validate. safetensors only."""

import copy
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME

from hf_devft.files import as_record, note_checksum, read_json, read_tensors, write_tensors
from hf_devft.models.layout import State
from hf_devft.models.supported import check_adapter


ADAPTER_WEIGHTS = "adapter_model.safetensors"

# What a LoRA config from elsewhere may set; PEFT imports modules, reads files or renumbers layers for the others.
_OPTIONS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_dora", "target_parameters", "ensure_weight_tying", "layer_replication", "trainable_token_indices",
}  # fmt: skip
_MOST_NAMES = 4096  # in one option; PEFT compares each with every module
_LARGEST_ALPHA = 1e6


def save_adapter(folder: str | Path, peft_config: PeftConfig, state: State) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, loadable with plain PEFT.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(peft_config)
    config.inference_mode = True
    if config.modules_to_save:
        config.modules_to_save = sorted(set(config.modules_to_save))  # PEFT adds its own names each time
    config.save_pretrained(folder)
    note_checksum(folder / CONFIG_NAME)
    write_tensors(folder / ADAPTER_WEIGHTS, state)


def load_adapter(folder: str | Path) -> tuple[PeftConfig, State]:
    """Read the config and the tensors of an adapter folder, and check that they fit each other.

    Whoever has written it has no power here: patterns that are not known to be harmless are not run, no module is
    imported for it, and its base is not loaded.

    Raises:
        ValueError: a file is missing or broken, or the adapter is not LoRA or IA3.
    """
    folder = Path(folder)
    if missing := [name for name in (CONFIG_NAME, ADAPTER_WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} holds no readable adapter: {', '.join(missing)} is missing (pickled weights are not read)."
        )
    try:
        _check_form(folder / CONFIG_NAME)
        config = PeftConfig.from_pretrained(str(folder))
        state = read_tensors(folder / ADAPTER_WEIGHTS)
        check_adapter(config)
        _check_values(config)
        _check_ranks(config, state)
        if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
            config.target_modules, config.exclude_modules = _modules_of(state), None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no readable adapter: {error}") from error
    return config, state


def _check_form(path: Path) -> None:
    """Refuse a config that is not of the types that PEFT says it has."""
    content = read_json(path)
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{path} has peft_type {kind!r}, which PEFT does not know.")
    if isinstance(content.get("lora_alpha"), float):  # which PEFT takes, whatever it says
        content["lora_alpha"] = 1
    as_record(content, PEFT_TYPE_TO_CONFIG_MAPPING[kind], str(path))
    own = {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "peft_type"}
    if kind == "LORA":
        default = LoraConfig()
        others = content.keys() - _OPTIONS - own
        if unsafe := sorted(name for name in others if content[name] != getattr(default, name, content[name])):
            raise ValueError(f"{path} sets {', '.join(unsafe)}, which stages cannot carry: leave it out.")


def _check_values(config: PeftConfig) -> None:
    """Refuse numbers and patterns that no adapter of a run has."""
    patterns = {name: getattr(config, name, None) or {} for name in ("rank_pattern", "alpha_pattern")}
    names = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform")
    for name, value in [*patterns.items(), *((name, getattr(config, name, None)) for name in names)]:
        if not isinstance(value, str | int | None) and len(value) > _MOST_NAMES:
            raise ValueError(f"{name} has {len(value)} entries, {_MOST_NAMES} at most are read.")
    if not isinstance(config, LoraConfig):
        return
    alphas = [config.lora_alpha, *patterns["alpha_pattern"].values()]
    if wrong := [alpha for alpha in alphas if not _is_number(alpha) or not 0 < alpha <= _LARGEST_ALPHA]:
        raise ValueError(
            f"lora_alpha or an alpha_pattern is {wrong[0]!r}: give one above 0, up to {_LARGEST_ALPHA:g}."
        )
    if wrong := [rank for rank in patterns["rank_pattern"].values() if type(rank) is not int or rank < 1]:
        raise ValueError(f"a rank_pattern is {wrong[0]!r}: give a rank of 1 or more.")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"lora_dropout is {config.lora_dropout}: give 0 to below 1.")
    keys = [*patterns["rank_pattern"], *patterns["alpha_pattern"], *_listed(config.layers_pattern)]
    if wrong := [key for key in keys if not _is_harmless(key)]:
        raise ValueError(f"{wrong[0][:80]!r} is a pattern that may take forever: name modules only, such as 'q_proj'.")


def _check_ranks(config: PeftConfig, state: State) -> None:
    """Refuse an adapter whose tensors have other ranks than its config."""
    factors = {
        key: tensor for key, tensor in state.items() if re.search(r"\.lora_(A|B|embedding_A|embedding_B)\b", key)
    }
    if flat := [key for key, tensor in factors.items() if tensor.dim() < 2]:
        raise ValueError(f"{flat[0]!r} is no matrix.")
    ranks = {tensor.shape[0] for key, tensor in state.items() if "lora_A" in key or "lora_embedding_A" in key}
    known = {config.r, *config.rank_pattern.values()} if isinstance(config, LoraConfig) else set()
    of_experts = getattr(config, "target_parameters", None)  # whose ranks are times the number of experts
    if (
        bool(ranks) != bool(known)
        or not (ranks <= known or of_experts)
        or max(known, default=0) > max(ranks, default=0)
    ):
        raise ValueError(f"its rank is {known}, its tensors have {ranks}.")


def _modules_of(state: State) -> str:
    """The modules that have tensors, as a pattern: one from elsewhere is not run to find them."""
    own = [re.match(r"base_model\.model\.(.*)\.(lora|ia3)_", key) for key in state]
    return "|".join(sorted({re.sub(r"\b\d+\b", r"\\d+", re.escape(match[1])) for match in own if match}))


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
