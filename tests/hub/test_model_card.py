from pathlib import Path

import pytest
from huggingface_hub import ModelCard


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


def test_there_is_a_plot_beside_every_card(output):
    for folder in (Path(output.args.output_dir), *Path(output.args.output_dir).glob("stage-*")):
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
