"""The examples, run as they stand in a folder of their own (in this process: each would import for seconds)."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from hf_devft.embedded import BASE_PATH
from hf_devft.federation.methods import METHODS


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run_in_its_folder(*command):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        registered = dict(METHODS)
        runpy.run_path(str(command[0]), run_name="__main__")
        for name in METHODS.keys() - registered.keys():  # which no other test should meet
            del METHODS[name]
        return capsys.readouterr().out

    return run_in_its_folder


@pytest.mark.parametrize(
    "name",
    ["classification", "clients_from_files", "continue_from_stage", "load_stage", "merge_and_save", "newer_base"],
)
def test_without_its_arguments_an_example_says_which(run, name, capsys):
    with pytest.raises(SystemExit):
        run(EXAMPLES / f"{name}.py")
    assert "the following arguments are required: " in capsys.readouterr().err


def test_own_clients_then_what_can_be_done_with_a_stage(run, tmp_path):
    run(EXAMPLES / "own_clients.py")
    stage = "outputs/own-clients/stage-2"
    answer = run(EXAMPLES / "load_stage.py", stage, "Repeat these words: red cat milk")
    assert answer.strip()

    run(EXAMPLES / "merge_and_save.py", stage, "merged")
    tokens = torch.tensor([[5, 6, 7]])
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / stage, dtype="float32")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
        torch.testing.assert_close(merged, loaded(tokens).logits)

    run(EXAMPLES / "continue_from_stage.py", stage)
    assert (tmp_path / "outputs/continued/stage-2/adapter_model.safetensors").exists()


def test_clients_from_files(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".DS_Store").write_text("not a client's")
    for name in ("north", "south"):
        (tmp_path / "mine" / f"{name}.csv").write_text("question,answer\n" + "1+1?,2\n2+2?,4\n" * 8)
    said = run(EXAMPLES / "clients_from_files.py", "mine")
    assert "north.csv: loss" in said
    assert "worst" in said


def test_classification(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 6}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    assert "complaint" in run(EXAMPLES / "classification.py", "bert")


def test_own_callback(run):
    rounds, megabytes = run(EXAMPLES / "own_callback.py").split(" rounds, ")
    assert 0 < int(rounds.split()[-1]) < 8
    assert 3 <= float(megabytes.split()[0]) < 6


@pytest.fixture
def run_cells(tmp_path, monkeypatch, capsys):
    """Run a notebook's cells one after another, as a kernel does, with fewer rounds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run_them(name: str) -> str:
        cells = json.loads((EXAMPLES / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        names: dict = {"__name__": "__main__"}
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]).replace("stage_rounds=[8, 4]", "stage_rounds=[3, 1]"), names)
        return capsys.readouterr().out

    return run_them


def test_the_first_runs_notebook(run_cells, tmp_path):
    said = run_cells("first_run")
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", said)]
    assert losses == sorted(losses, reverse=True)
    assert "4 layers, 1,150,080 parameters" in said


def test_the_notebook_of_a_stage(run_cells, tmp_path):
    said = run_cells("a_stage_from_inside")
    assert "group 3" in said
    assert "a submodel of 4 layers" in said
    assert (tmp_path / "groups.png").stat().st_size > 10_000


def test_own_method_then_a_newer_base(run, tmp_path):
    run(EXAMPLES / "own_method.py")
    newer = AutoModelForCausalLM.from_pretrained(BASE_PATH)
    with torch.no_grad():
        newer.model.layers[3].mlp.up_proj.weight *= 1.2
    newer.save_pretrained(tmp_path / "newer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE_PATH / name, tmp_path / "newer")
    said = run(EXAMPLES / "newer_base.py", "outputs/own-method/stage-2", "newer")
    assert "of a layer's (layer 3)" in said
