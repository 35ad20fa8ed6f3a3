"""A run from a YAML file and `--flag value` overrides: one dataclass for the data and the adapter, one for the run."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import HfArgumentParser

from hf_devft.configuration import DevFTConfig


@dataclass
class RecipeArguments:
    """What to train, on what data; the rest of a recipe's keys are those of `DevFTConfig`."""

    model_name_or_path: str = field(
        default="embedded", metadata={"help": 'Base model: a Hub name, a path, or "embedded".'}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter to start from, a folder or a Hub name, instead of a new one."}
    )
    train_file: list[str] | None = field(
        default=None, metadata={"help": "JSON or JSONL files; column `source` holds the stem. Default: made-up tasks."}
    )
    eval_file: list[str] | None = field(default=None, metadata={"help": "JSON or JSONL files to evaluate on."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, instead of files."})
    dataset_train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    dataset_eval_split: str | None = field(default=None, metadata={"help": "Its split to evaluate on."})
    task_rows: int = field(default=4000, metadata={"help": "Made-up tasks to train on, without files or dataset."})
    task_families: list[str] | None = field(
        default=None,
        metadata={"help": "Families of made-up tasks; default: those that the embedded base has never seen."},
    )
    task_eval_rows: int = field(default=200, metadata={"help": "Made-up tasks to evaluate on."})
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules to adapt."}
    )

    plan: bool = field(default=False, metadata={"help": "Only say what the run would cost."})
    plan_json: bool = field(default=False, metadata={"help": "The same as JSON."})

    def lora_config(self) -> LoraConfig:
        """The adapter's config."""
        modules = self.lora_target_modules
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if modules == ["all-linear"] else modules,
            task_type="CAUSAL_LM",
        )


_LISTS = {
    item.name for kind in (RecipeArguments, DevFTConfig) for item in fields(kind) if "list[" in str(item.type)
} - {"report_to", "debug"}


def parse_arguments(argv: Sequence[str], default_config: Path) -> tuple[RecipeArguments, DevFTConfig]:
    """Arguments of a recipe.

    Args:
        argv: `--config FILE` (a YAML mapping; default: `default_config`) and `--key value` for any key, which wins
            over the file.

    Raises:
        ValueError: an unreadable file or an unknown key, with the nearest known one; bad values as `DevFTConfig` says.
    """
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    config = default_config
    if "--config" in argv:
        position = argv.index("--config")
        if position + 1 == len(argv):
            raise ValueError("--config needs the path of a YAML file.")
        config = Path(argv[position + 1])
        del argv[position : position + 2]
    parser = HfArgumentParser((RecipeArguments, DevFTConfig), allow_abbrev=False)
    known = {item.name for kind in (RecipeArguments, DevFTConfig) for item in fields(kind) if item.init}
    values = _read_yaml(config)
    _refuse_unknown(values, known, str(config))
    parser.set_defaults(**values)
    namespace, rest = parser.parse_known_args(argv)
    _refuse_unknown([word.removeprefix("--") for word in rest], known, "the command line")
    given = vars(namespace)
    return tuple(
        kind(**{item.name: given[item.name] for item in fields(kind) if item.init and item.name in given})
        for kind in (RecipeArguments, DevFTConfig)
    )


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the config {path} must be a mapping of keys to values, not a {type(values).__name__}.")
    return {key: _as_written(key, value) for key, value in values.items()}


def _as_written(key: str, value: Any) -> Any:
    """What the user meant: YAML reads the word `no` as false, and one value may stand for a list of one."""
    if value is False and str(key).endswith("_strategy"):
        return "no"
    if key in _LISTS and value is not None and not isinstance(value, list):
        return [value]
    return value


def _refuse_unknown(keys: Sequence[str], known: set[str], where: str) -> None:
    for key in keys:
        name = key.split("=")[0].replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else " See `--help`."
            raise ValueError(f"unknown key {key!r} in {where}.{hint}")
