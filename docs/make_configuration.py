"""Writes docs/configuration.md from the dataclasses, and docs/compatibility.md from the table: `make docs`."""

import re
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from hf_devft.cli.arguments import RecipeArguments
from hf_devft.configuration.compatibility import CONFLICTS
from hf_devft.configuration.devft_config import CHOICES, UNSUPPORTED, DevFTConfig
from hf_devft.configuration.facts import FACTS
from hf_devft.configuration.output_options import OutputOptions
from hf_devft.configuration.privacy_options import PrivacyOptions


PAGE = Path(__file__).with_name("configuration.md")
COMPATIBILITY = Path(__file__).with_name("compatibility.md")
HEAD = """# Configuration

Made by `make docs` from the docstrings of `DevFTConfig` and `RecipeArguments`. Every key is a key of a YAML config, a
flag of `recipes/devft.py`, and (those of `DevFTConfig`) an argument in Python. Beside these, all of
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) hold:
its *step* is a round, its *epoch* a stage; [what differs](#what-differs-from-trainingarguments).
With `--trainer sft` or `dpo`, the options of TRL's config hold, too.

The defaults are those of Python and of a config of your own. Without `--config`, a run starts from
[`own_data.yaml`](../recipes/configs/own_data.yaml) where it has files or datasets, else from
[`quickstart.yaml`](../recipes/configs/quickstart.yaml).
"""
COMPATIBILITY_HEAD = """# What goes together

Made by `make docs` from the one table of `hf_devft.configuration.compatibility`. Options, methods, adapters, models
and engines that share no row go together; single values, data and files are checked where they are read.
A run that asks for both of a row is refused before any work is spent, and so is its `--plan`, as far as the config,
the adapter and the model's architecture tell.

| | with | why, and what to change |
|---|---|---|
"""
_ENTRY = re.compile(r"^ {8}(\w+) \((.*?)\):\n((?: {12}.*\n|\n)+)", re.MULTILINE)


def page() -> str:
    """The Markdown of the reference."""
    text = HEAD
    docstrings = [options.__doc__ for options in (DevFTConfig, PrivacyOptions, OutputOptions)]
    for section in [part for docstring in docstrings for part in docstring.split("    > ")[1:]]:
        title, _, entries = section.partition("\n")
        text += f"\n## {title}\n\n| key | type and default | meaning |\n|---|---|---|\n"
        for name, kind, meaning in _ENTRY.findall(entries.rstrip(" ") + "\n"):
            choices = ", ".join(f"`{choice}`" for choice in CHOICES.get(name, ()))
            text += _row(name, kind, f"{meaning.strip()} Choices: {choices}." if choices else meaning)
    text += "\n## Parameters of the recipe alone\n\n| key | default | meaning |\n|---|---|---|\n"
    for item in fields(RecipeArguments):
        default = item.default_factory() if callable(item.default_factory) else item.default
        text += _row(item.name, f"`{default}`", item.metadata["help"])
    text += "\n## What differs from `TrainingArguments`\n\n| key | default here | default there |\n|---|---|---|\n"
    theirs = {item.name: item.default for item in fields(TrainingArguments)}
    for item in fields(DevFTConfig):
        if item.name in theirs and item.default != theirs[item.name]:
            text += _row(item.name, *(f"`{_said(each)}`" for each in (item.default, theirs[item.name])))
    text += "\nRefused, unless left as they are:\n\n| key | instead |\n|---|---|\n"
    for name, (_, instead) in UNSUPPORTED.items():
        text += _row(name, instead)
    return text


def compatibility_page() -> str:
    """The Markdown of what cannot go together."""
    text = COMPATIBILITY_HEAD
    for one, other, why in CONFLICTS:
        text += f"| {FACTS[one].name} | {FACTS[other].name} | {why} |\n"
    return text


def _said(default: object) -> object:
    return getattr(default, "value", default)


def _row(name: str, *others: str) -> str:
    cells = (f"`{name}`", *(" ".join(other.split()).replace("*optional*, ", "") for other in others))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    COMPATIBILITY.write_text(compatibility_page())
