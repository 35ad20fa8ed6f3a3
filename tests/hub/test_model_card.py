import re
from pathlib import Path

import pytest
from conftest import config, lora, tiny_llama
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_devft import DevFTTrainer
from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import make_trainer as make_trainer_of


@pytest.fixture
def output(make_trainer, eval_tasks):
    trainer = make_trainer(eval_dataset=eval_tasks, eval_strategy="steps", eval_steps=1)
    trainer.train()
    return trainer


def test_the_card_tells_the_runs_own_numbers(output):
    folder = Path(output.args.output_dir)
    card = ModelCard.load(folder / "README.md")
    loss = output.stages[-1].metrics["eval_full_loss"]
    assert card.data.library_name == "peft"
    assert card.data.eval_results[0].metric_value == loss
    assert f"{loss:.3f}" in card.text
    assert "stage 2 of 2" in card.text
    assert f'from_pretrained("{output.args.output_dir}")' in card.text
    assert "stage 1 of 2" in (folder / "stage-1" / "README.md").read_text()
    assert "The clients were simulated in one job" in card.text


def test_the_metadata_is_the_hubs_own(make_trainer, eval_tasks):
    trainer = make_trainer(
        eval_dataset=eval_tasks,
        stage_rounds=[1],
        card_license="apache-2.0",
        card_language=["en"],
        card_datasets=["me/d"],
    )
    trainer.model.get_base_model().config._name_or_path = "me/base"
    trainer.train()
    data = ModelCard.load(Path(trainer.args.output_dir) / "README.md").data.to_dict()
    expected = {
        "base_model": "me/base", "base_model_relation": "adapter", "library_name": "peft", "license": "apache-2.0",
        "language": ["en"], "datasets": ["me/d"], "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert {key: data[key] for key in expected} == expected
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "me/d"


@pytest.mark.parametrize(("base", "named"), [("me/base-GGUF/base-q4.gguf", "me/base-GGUF"), ("me/base", "me/base")])
def test_a_base_is_named_as_the_hub_knows_it(make_trainer, base, named):
    trainer = make_trainer(stage_rounds=[1], stage_layers=[4])
    trainer.model.get_base_model().config._name_or_path = base
    trainer.train()
    assert ModelCard.load(Path(trainer.args.output_dir) / "README.md").data.base_model == named


def test_a_card_names_no_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clinic").mkdir()
    (tmp_path / "clinic" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    recipe, args = parse_arguments(["--dataset_name", "clinic", "--num_clients", "2", "--use_cpu", "true"])
    assert make_trainer_of(recipe, args).args.card_datasets is None


def test_the_cards_snippets_run(tmp_path, monkeypatch, tasks, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = DevFTTrainer(
        str(tmp_path / "base"), config(tmp_path / "run", stage_rounds=[1]), peft_config=lora(), train_dataset=tasks
    )
    trainer.train()
    for stage, folder in ((1, tmp_path / "run" / "stage-1"), (2, tmp_path / "run")):
        monkeypatch.chdir(tmp_path)
        snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        assert len(snippets) == 2
        for snippet in snippets:
            exec(snippet, {})
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_hidden_layers == 2 * stage


def test_there_is_a_plot_beside_every_card(output):
    for folder in (Path(output.args.output_dir), *Path(output.args.output_dir).glob("stage-*")):
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
