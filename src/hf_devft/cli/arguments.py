"""A run from a YAML file and `--flag value` overrides: one dataclass for the data and the adapter, one for the run."""

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from peft import LoraConfig
from transformers import HfArgumentParser

import hf_devft
from hf_devft.cli.configs import packaged_config, take_config
from hf_devft.cli.values import check_value
from hf_devft.configuration import DevFTConfig
from hf_devft.configuration.devft_config import RENAMED, UNSUPPORTED
from hf_devft.tasks import task_named
from hf_devft.tasks.data import SOURCE


# Trainer -> what the names of its class and its config begin with.
TRAINERS = {"devft": "DevFT", "sft": "DevFTSFT", "dpo": "DevFTDPO"}
_OTHER_ROWS = ("eval_file", "eval_fraction", "dataset_eval_split")  # to evaluate on than the clients'
# (key of a file, another that takes its place on the command line).
_RIVALS = (
    ("stage_layers", "initial_layers"),
    ("stage_layers", "growth_factor"),
    ("stage_layers", "adapter_layers"),
    ("adapter_layers", "stage_layers"),
    ("dataset_eval_split", "eval_fraction"),
    ("eval_file", "eval_fraction"),
    ("eval_fraction", "eval_file"),
    ("eval_fraction", "dataset_eval_split"),
    ("dataset_name", "train_file"),
    ("dataset_config", "train_file"),
    ("dataset_train_split", "train_file"),
    ("dataset_eval_split", "train_file"),
    ("dataset_eval_split", "eval_file"),
    ("train_file", "dataset_name"),
    ("eval_file", "dataset_eval_split"),
    *((others, "client_eval_size") for others in _OTHER_ROWS),
    *(("client_eval_size", others) for others in _OTHER_ROWS),
)
# Options that are text, where `true` stands for the default or the newest.
_TEXT_OR_TRUE = ("init_lora_weights", "resume_from_checkpoint")
# Of a new adapter's config.
_OF_NEW_ADAPTERS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers", "lora_modules_to_save", "use_rslora",
    "init_lora_weights", "use_dora",
)  # fmt: skip


@dataclass
class RecipeArguments:
    """What to train, on what data; the rest of a recipe's keys are those of `DevFTConfig`."""

    model_name_or_path: str = field(
        default="embedded", metadata={"help": 'Base model: a Hub name, a path, or "embedded".'}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter to start from, a folder or a Hub name, instead of a new one."}
    )
    trainer: str = field(
        default="devft",
        metadata={"help": f"{tuple(TRAINERS)}; the others are TRL's, and so are their options and data."},
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "JSON, JSONL, CSV, TSV, Parquet or text files, a client each unless `partition` or "
                          "`num_clients` is given; column `source` says which. Default: made-up tasks."},
    )  # fmt: skip
    eval_file: list[str] | None = field(default=None, metadata={"help": "Such files to evaluate on."})
    eval_fraction: float | None = field(
        default=None,
        metadata={"help": "Part of one's own rows that is held out for that, without such a file. Default: a tenth, "
                          "if `eval_strategy` asks for it."},
    )  # fmt: skip
    calibration_file: list[str] | None = field(
        default=None,
        metadata={"help": "Such files of the server's own, for `calibration_samples`. Default: rows held out of "
                          "training."},
    )  # fmt: skip
    dataset_name: list[str] | None = field(
        default=None,
        metadata={"help": "Datasets on the Hub, or local folders, instead of files; of several, column `source` says "
                          "which."},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "Their configuration (subset)."})
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
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules to adapt: names, 'all-linear', or one regular expression."},
    )
    lora_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Layers to adapt, from 0 (PEFT's `layers_to_transform`); name `lora_target_modules`, too."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to train whole. Default: the task's head, unless PEFT knows it."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha over the square root of the rank."})
    init_lora_weights: str | None = field(
        default=None, metadata={"help": "As PEFT's: 'gaussian', 'orthogonal', 'pissa', 'olora'; default: B is zero."}
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: also train the norms of the weights."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End a stage after so many evaluations without a better `metric_for_best_model`; set "
                          "`load_best_model_at_end`, too."},
    )  # fmt: skip

    plan: bool = field(default=False, metadata={"help": "Only say what the run would cost."})
    plan_json: bool = field(default=False, metadata={"help": "The same as JSON."})
    traceback: bool = field(default=False, metadata={"help": "Show where an error comes from."})

    def __post_init__(self):
        for option in ("task_rows", "task_eval_rows", "lora_r"):
            if (value := getattr(self, option)) < 1:
                raise ValueError(f"{option}={value} is too small: give 1 or more.")
        if self.train_file and self.dataset_name:
            raise ValueError("train_file and dataset_name are both given: leave one of them out.")
        if self.dataset_eval_split and (self.eval_file or not self.dataset_name):
            raise ValueError(
                "dataset_eval_split is a part of dataset_name to evaluate on: give either it or eval_file, and no "
                "split without a dataset."
            )
        if self.dataset_config and not self.dataset_name:
            raise ValueError(
                f"dataset_config={self.dataset_config!r} is of a dataset_name: give that, or leave it out."
            )
        if self.eval_fraction and (self.eval_file or self.dataset_eval_split):
            raise ValueError(
                f"eval_fraction={self.eval_fraction} holds rows out where no others are to be evaluated on: leave it "
                "out, or eval_file and dataset_eval_split."
            )
        if self.eval_fraction and not (self.train_file or self.dataset_name):
            raise ValueError(
                f"eval_fraction={self.eval_fraction} is of one's own rows: give `train_file` or `dataset_name`; of "
                "made-up tasks, `task_eval_rows` are evaluated on."
            )
        if self.eval_fraction is not None and not 0 <= self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction={self.eval_fraction}: give a part from 0, which holds nothing out, to below 1."
            )

    def lora_config(self, task: str | None) -> LoraConfig:
        """The adapter's config, for a task of `DevFTConfig.task`."""
        modules, own = self.lora_target_modules, task_named(task)
        one = modules[0] if len(modules) == 1 else ""
        head = self.lora_modules_to_save or own.head
        chooses = one == "all-linear" or re.search(r"[^\w.]", one)
        if self.lora_layers is not None and chooses:
            raise ValueError(
                f"lora_layers={self.lora_layers} needs modules by their names, as in `--lora_target_modules q_proj "
                f"v_proj`, not {one!r}."
            )
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=one if chooses else modules,
            layers_to_transform=self.lora_layers,
            modules_to_save=head,
            # PEFT leaves the heads of generation and of text classification out of "all-linear", not the others.
            exclude_modules=["classifier", *(head or [])] if one == "all-linear" and own.classes else None,
            use_rslora=self.use_rslora,
            init_lora_weights=self.init_lora_weights or True,
            use_dora=self.use_dora,
            task_type=own.peft_type,
        )


def _config_class(trainer: str) -> type[DevFTConfig]:
    """The config of a trainer.

    Raises:
        ValueError: there is no such trainer. ImportError: TRL is not installed.
    """
    if trainer not in TRAINERS:
        raise ValueError(f"trainer={trainer!r} is unknown: choose one of {', '.join(TRAINERS)}.")
    return getattr(hf_devft, f"{TRAINERS[trainer]}Config")


class OneLineParser(HfArgumentParser):
    """Whose errors are one line, not all of its options."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong.

        Raises:
            ValueError: always.
        """
        given = message.partition("value: ")[2]
        raise ValueError(message + (". Separate values by spaces." if "," in given else ""))


def parse_arguments(argv: Sequence[str], default_config: Path | None = None) -> tuple[RecipeArguments, DevFTConfig]:
    """Arguments of a recipe; the second is the config of `--trainer`.

    Args:
        argv: `--config` (a YAML mapping, or the name of a packaged one) and `--key value` for any key, which wins over
            the file.
        default_config: where there is no `--config`; by default `own_data.yaml` with data of one's own, else
            `quickstart.yaml`.

    Raises:
        ValueError: an unreadable file or an unknown key, with the nearest known one; bad values as `DevFTConfig` says.
    """
    named, argv = take_config(argv)
    flags = [_key(word) for word in argv if word.startswith("--")]
    has_data = {"train_file", "dataset_name"} & set(flags)
    config = named or default_config or packaged_config("own_data" if has_data else "quickstart")
    values = _read_yaml(config)
    _drop_rivals(values, flags, argv)
    chosen = values.keys() | set(flags)
    if "num_train_epochs" in chosen:  # also where it is the default
        raise ValueError(f"num_train_epochs is not used: {UNSUPPORTED['num_train_epochs'][1]}.")
    kinds = (RecipeArguments, _config_class(_value_of("trainer", argv) or values.get("trainer", "devft")))
    options = {item.name: str(item.type) for kind in kinds for item in fields(kind) if item.init}
    lists = {
        key: of
        for key, kind in options.items()
        for name, of in _LISTS.items()
        if name in kind and key not in ("report_to", "debug")
    }
    values = {key: _as_written(lists.get(key), key, value) for key, value in values.items()}
    parser = OneLineParser(kinds, allow_abbrev=False)
    known = set(options)
    if "--help-all" in argv:
        parser.print_help()
        sys.exit()
    _refuse_unknown(values, known, str(config))
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for key, value in values.items():
        if key not in UNSUPPORTED and not (key in _TEXT_OR_TRUE and value is True):
            check_value(key, value, hints[key], str(config))
    _refuse_twice([key for key, of in lists.items() if of is str], flags)
    parser.set_defaults(**values)
    namespace, rest = parser.parse_known_args(argv)
    _refuse_rest(rest, known)
    given = vars(namespace)
    if given["adapter_name_or_path"] and (own := [flag for flag in flags if flag in _OF_NEW_ADAPTERS]):
        raise ValueError(
            f"--{own[0]} is of a new adapter, but that of adapter_name_or_path has a config of its own: leave it out."
        )
    if not chosen & {"partition", "num_clients"} and len(given["train_file"] or []) > 1:
        given |= {"partition": "natural", "partition_column": SOURCE}  # a file, a client
    return tuple(
        kind(**{item.name: given[item.name] for item in fields(kind) if item.init and item.name in given})
        for kind in kinds
    )


def _drop_rivals(values: dict, flags: Sequence[str], argv: Sequence[str]) -> None:
    """Drop from a file's values, in place, those whose place a flag takes: the command line wins, by either name."""
    off = {flag for flag in ("eval_fraction", "distillation_steps") if _value_of(flag, argv) in ("0", "0.0")}
    for old, new in (*RENAMED.items(), *_RIVALS):
        if new in flags and new not in off:
            values.pop(old, None)
    distils = "distillation_steps" in flags or values.get("distillation_steps")
    if "learning_rate" in flags and (not distils or "distillation_steps" in off):
        values.pop("stage_learning_rates", None)  # which distillation has beside its own


def _value_of(key: str, argv: Sequence[str]) -> str | None:
    """The value that the command line gives a key."""
    words = [part for word in argv for part in word.split("=", 1)]
    return next((after for word, after in pairwise(words) if word.startswith("--") and _key(word) == key), None)


def _key(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0].replace("-", "_")


def _refuse_twice(keys: Iterable[str], flags: Sequence[str]) -> None:
    """Refuse a list in two parts, of which only the last would count."""
    if twice := next((key for key in keys if flags.count(key) > 1), None):
        raise ValueError(f"--{twice} is given twice: give its values after one, separated by spaces.")


class _OnceEach(yaml.SafeLoader):
    """Reads YAML; a key given twice in a mapping is a mistake, not a change of mind."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.load(path.read_text(), _OnceEach)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ValueError(f"the config {path} cannot be read: {where}{error.problem}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the config {path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"the config {path} must be a mapping of keys to values, not a {type(values).__name__}.")
    return values


# Type of an option -> of its items.
_LISTS: dict[str, type] = {"list[str]": str, "list[int]": int, "list[float]": float}


def _as_written(of: type | None, key: str, value: Any) -> Any:
    """What the user meant: YAML reads the word `no` as false and 1e-3 as text, and one value, or several in a text as
    on the command line, may stand for a list.

    Args:
        of: the type of a list's items; else None.
    """
    if value is False and str(key).endswith("_strategy"):
        return "no"
    if of is None or value is None:
        return value
    words = value.split() if isinstance(value, str) and of is not str else value
    items = words if isinstance(words, list) else [words]
    try:
        return [of(item) if isinstance(item, str) else item for item in items]
    except ValueError:
        return value  # which the parser or the config refuses


def _refuse_unknown(keys: Iterable[Any], known: set[str], where: str) -> None:
    """Refuse keys that are not known as they are written."""
    for key in map(str, keys):
        if key not in known:
            nearest = difflib.get_close_matches(_key(key), known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else " See `--help`."
            raise ValueError(f"unknown key {key!r} in {where}.{hint}")


def _refuse_rest(words: Iterable[str], known: set[str]) -> None:
    """Refuse what is left of a command line, which no flag has taken."""
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if Path(word).is_file():
            raise ValueError(f"unknown key {word!r} in the command line. Give files after `--train_file`.")
        if _key(name) in known:
            raise ValueError(
                f"{word!r} in the command line belongs to no flag. Did you mean `--{_key(name)} {value or '...'}`?"
            )
        _refuse_unknown([name], known, "the command line")
