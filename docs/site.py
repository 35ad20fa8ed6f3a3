"""What mkdocs asks while it makes the site: the README is its first page, files beside the pages are named only."""

import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]


def on_files(files, config):
    """Add the first page: the README, with links as from within docs/."""
    text = re.sub(r"\]\((?!http|#)(?!docs/)([^)]+)\)", r"](../\1)", (ROOT / "README.md").read_text())
    files.append(File.generated(config, "index.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leave out links to what is no page: recipes, examples, results."""
    return re.sub(r"\[([^]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
