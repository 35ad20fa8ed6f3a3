"""Writes docs/configuration.md from the dataclasses: `make docs`."""

import re
from dataclasses import fields
from pathlib import Path

from hf_devft.arguments import RecipeArguments
from hf_devft.configuration import DevFTConfig


PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Made by `make docs` from the docstrings of `DevFTConfig` and `RecipeArguments`. Every key is a key of a YAML config, a
flag of `recipes/devft.py`, and (those of `DevFTConfig`) an argument in Python. Beside these, all of
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) hold:
its *step* is a round, its *epoch* a stage. With `--trainer sft` or `dpo`, the options of TRL's config hold, too.
"""
_ENTRY = re.compile(r"^ {8}(\w+) \((.*?)\):\n((?: {12}.*\n|\n)+)", re.MULTILINE)


def page() -> str:
    """The Markdown of the reference."""
    text = HEAD
    for section in DevFTConfig.__doc__.split("    > ")[1:]:
        title, _, entries = section.partition("\n")
        text += f"\n## {title}\n\n| key | type and default | meaning |\n|---|---|---|\n"
        for name, kind, meaning in _ENTRY.findall(entries.rstrip(" ") + "\n"):
            text += _row(name, kind, meaning)
    text += "\n## Parameters of the recipe alone\n\n| key | default | meaning |\n|---|---|---|\n"
    for item in fields(RecipeArguments):
        default = item.default_factory() if callable(item.default_factory) else item.default
        text += _row(item.name, f"`{default}`", item.metadata["help"])
    return text


def _row(name: str, kind: str, meaning: str) -> str:
    cells = (f"`{name}`", " ".join(kind.split()).replace("*optional*, ", ""), " ".join(meaning.split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
