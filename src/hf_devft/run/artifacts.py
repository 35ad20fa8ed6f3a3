"""What a finished stage leaves: its folder, and the newest stage's files at the root."""

import shutil
from collections.abc import Callable
from pathlib import Path

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from hf_devft.configuration import StageConfig
from hf_devft.configuration.stage_folder import FEDERATION, SUBMODEL
from hf_devft.files import atomic_folder, replace_files
from hf_devft.models.adapter_files import save_adapter
from hf_devft.models.layout import State


def save_stage(
    output_dir: str | Path,
    stage: StageConfig,
    full: tuple[PeftConfig, State],
    sub: tuple[PeftConfig, State],
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
