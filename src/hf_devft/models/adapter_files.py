"""Adapters as PEFT folders: save, load, validate. safetensors only."""

import copy
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_devft.models.layout import State
from hf_devft.models.supported import check_adapter


ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_adapter(folder: str | Path, peft_config: PeftConfig, state: State) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, loadable with plain PEFT."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(peft_config)
    config.inference_mode = True
    if config.modules_to_save:
        config.modules_to_save = sorted(set(config.modules_to_save))  # PEFT adds its own names each time
    config.save_pretrained(folder)
    # Layers that share a broadcast adapter share its tensors: safetensors wants each with memory of its own.
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: str | Path) -> tuple[PeftConfig, State]:
    """Read the config and the tensors of an adapter folder, and check that they fit each other.

    Raises:
        ValueError: a file is missing or broken, or the adapter is not LoRA.
    """
    folder = Path(folder)
    if missing := [name for name in (CONFIG_NAME, ADAPTER_WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} holds no readable adapter: {', '.join(missing)} is missing (pickled weights are not read)."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable adapter: {error}") from error
    check_adapter(config)
    ranks = {tensor.shape[0] for key, tensor in state.items() if "lora_A" in key or "lora_embedding_A" in key}
    known = {config.r, *config.rank_pattern.values()} if isinstance(config, LoraConfig) else set()
    of_experts = getattr(config, "target_parameters", None)  # whose ranks are times the number of experts
    if bool(ranks) != bool(known) or not (ranks <= known or of_experts):
        raise ValueError(f"{folder} holds no readable adapter: its rank is {known}, its tensors have {ranks}.")
    if isinstance(config.target_modules, str):
        # A pattern from elsewhere is not run: the tensors tell which modules it found.
        own = [re.match(r"base_model\.model\.(.*)\.(lora|ia3)_", key) for key in state]
        modules = sorted({re.sub(r"\b\d+\b", r"\\d+", re.escape(match[1])) for match in own if match})
        config.target_modules = "|".join(modules)
        config.exclude_modules = None
    return config, state
