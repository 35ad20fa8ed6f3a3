"""Adapters as PEFT folders: save, load, validate. safetensors only."""

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from hf_devft.configuration import StageConfig
from hf_devft.files import atomic_folder, replace_files
from hf_devft.layout import State
from hf_devft.stages.healing import healed_path
from hf_devft.stages.supported import check_adapter


ADAPTER_WEIGHTS = "adapter_model.safetensors"
SUBMODEL = "submodel"
PLOT = "loss.png"
LEDGER = "ledger.json"
FEDERATION = "federation.safetensors"  # what stays with the clients: never pushed


def save_adapter(folder: str | Path, peft_config: LoraConfig, state: State) -> None:
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


@contextmanager
def _reading(repo_id: str) -> Iterator[None]:
    """What goes wrong with a repository is a ValueError that names it."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        raise ValueError(f"{repo_id} is neither a folder nor a readable repository: {error}") from error


def newest_commit(repo_id: str, revision: str | None = None, token: str | None = None) -> str:
    """The commit that a repository's branch stands at.

    Raises:
        ValueError: the repository cannot be read.
    """
    with _reading(repo_id):
        return HfApi(token=token).model_info(repo_id, revision=revision).sha


def download_stage(repo_id: str, revision: str | None = None, token: str | None = None, healed: bool = False) -> str:
    """The newest stage of a repository, in a local folder; no more than a run needs to go on, and nothing pickled.

    Args:
        healed: whether the run has healed its submodels, whose layers it needs then.


    Raises:
        ValueError: the repository cannot be read.
    """
    with _reading(repo_id):
        patterns = ["*.json", ADAPTER_WEIGHTS, *([str(healed_path("*", "*"))] if healed else [])]
        return snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns)


def fetch_adapter(
    name_or_path: str | Path, subfolder: str = "", revision: str | None = None, token: str | None = None
) -> Path:
    """The local folder of an adapter in a folder or a repository, with the healed layers that it may be for. Nothing
    pickled is downloaded.

    Raises:
        ValueError: the repository cannot be read.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / subfolder
    files = [str(PurePosixPath(subfolder) / name) for name in (CONFIG_NAME, ADAPTER_WEIGHTS, healed_path("", "*"))]
    with _reading(str(name_or_path)):
        folder = snapshot_download(str(name_or_path), revision=revision, token=token, allow_patterns=files)
    return Path(folder) / subfolder


def load_adapter(folder: str | Path) -> tuple[LoraConfig, State]:
    """The config and the tensors of an adapter folder.

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


def save_stage(
    output_dir: str | Path,
    stage: StageConfig,
    full: tuple[LoraConfig, State],
    sub: tuple[LoraConfig, State],
    tokenizer: PreTrainedTokenizerBase | None,
    write_extras: Callable[[Path], None],
    write_card: Callable[[Path, str], None],
) -> None:
    """Write `output_dir/stage-N/` in one move, then its files but for `submodel/` at the root.

    Args:
        full, sub: full-depth and compact adapter; the compact one goes into `submodel/`.
        write_extras: called with the folder to write to, to add plot and ledger.
        write_card: called with a folder to write to and the one it will be.
    """
    output_dir = Path(output_dir)
    stage_folder, root = output_dir / f"stage-{stage.stage}", output_dir / ".root"
    with atomic_folder(stage_folder) as folder:
        save_adapter(folder, *full)
        save_adapter(folder / SUBMODEL, *sub)
        stage.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_extras(folder)
        write_card(folder, str(stage_folder))
    with atomic_folder(root) as folder:
        shutil.copytree(stage_folder, folder, ignore=shutil.ignore_patterns(SUBMODEL, FEDERATION), dirs_exist_ok=True)
        write_card(folder, str(output_dir))
    replace_files(root, output_dir)
    root.rmdir()
