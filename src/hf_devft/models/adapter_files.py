"""Adapters as PEFT folders: save, load, validate. safetensors only."""

import copy
import re
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME

from hf_devft.files import as_record, note_checksum, read_json, read_tensors, write_tensors
from hf_devft.models.layout import State
from hf_devft.models.supported import check_adapter, unknown_options


ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
        check_ranks(config, state)
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
    if kind == "LORA" and (unsafe := unknown_options(content)):
        raise ValueError(f"{path} sets {', '.join(unsafe)}, which stages cannot carry: leave it out.")


def check_ranks(config: PeftConfig, state: State) -> None:
    """Refuse an adapter whose tensors have other ranks than its config.

    Raises:
        ValueError: says which.
    """
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
        raise ValueError(
            f"its rank is {known}, its tensors have {ranks}: give no `r`, and no `rank_pattern`, that no module has."
        )


def _modules_of(state: State) -> str:
    """The modules that have tensors, as a pattern: one from elsewhere is not run to find them."""
    own = [re.match(r"base_model\.model\.(.*)\.(lora|ia3)_", key) for key in state]
    return "|".join(sorted({re.sub(r"\b\d+\b", r"\\d+", re.escape(match[1])) for match in own if match}))
