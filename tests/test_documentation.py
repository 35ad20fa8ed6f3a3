"""The documents tell what the code does."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest
from cogapp import Cog
from transformers import TrainingArguments

from hf_devft import DevFTConfig


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
make_configuration = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_configuration)


def test_the_reference_is_what_make_docs_writes():
    assert make_configuration.PAGE.read_text() == make_configuration.page(), "run `make docs`"
    assert make_configuration.COMPATIBILITY.read_text() == make_configuration.compatibility_page(), "run `make docs`"


def test_tables_of_results_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["cog", "--check", "-P", "-I", "docs", "-p", "from results import pick, show", *map(str, PAGES)]
    assert Cog().main(command) == 0, "run `make docs`"


def test_every_option_of_ours_is_in_the_reference():
    theirs = {item.name for item in fields(TrainingArguments)}
    ours = {item.name for item in fields(DevFTConfig)} - theirs
    named = set(re.findall(r"^\| `(\w+)` \|", make_configuration.page(), re.MULTILINE))
    assert ours <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if not link.startswith(("http", "mailto"))]
    missing = [link for link in local if not (page.parent / link).exists() and "…" not in link]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documents_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, str(page), "exec")


def test_every_config_and_page_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in (*(ROOT / "recipes" / "configs").glob("*.yaml"), *(ROOT / "docs").glob("*.md")):
        assert path.name in readme, path
