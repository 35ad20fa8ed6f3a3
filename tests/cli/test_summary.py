"""What a person reads before a run and after it."""

import re

import pytest
from conftest import lora

from hf_devft.cli.summary import closing, opening, say, say_at_start


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stage_layers": None, "adapter_layers": [1, 4], "federated_method": "ffa_lora"},
        {"stage_layers": [4], "wire_dtype": "int8", "upload_fraction": 0.5},
    ],
)
def test_what_is_said_to_be_sent_is_sent(make_trainer, eval_tasks, options):
    trainer = make_trainer(eval_dataset=eval_tasks, eval_on_start=True, peft_config=lora(r=8), **options)
    said = opening(trainer)
    trainer.train()
    megabytes = float(re.search(r"about (\S+) MB to send", said)[1])
    assert megabytes == pytest.approx(trainer.ledger.bytes / 1e6, rel=0.02)
    won = closing(trainer)
    assert "max_steps" not in won
    start, end = trainer.run.start_metrics["eval_full_loss"], trainer.stages[-1].metrics["eval_full_loss"]
    assert f"loss {start:.3f} → {end:.3f} at full depth\nfor {trainer.ledger.bytes / 1e6:.2f} MB" in won


@pytest.mark.parametrize(
    "options",
    [
        {"federated_method": "c2a"},
        {"federated_method": "dofit"},
        {"federated_method": "flexlora", "peft_config": lora(target_modules=["q_proj"], layers_to_transform=[2, 3])},
        {"max_steps": 1},
    ],
)
def test_whatever_is_trained_can_be_said(make_trainer, options):
    trainer = make_trainer(**options)
    megabytes = float(re.search(r"about (\S+) MB to send", opening(trainer))[1])
    assert megabytes > 0
    if "max_steps" in options:
        trainer.train()
        assert "; ended by max_steps, 1 of " in closing(trainer)
        assert megabytes == pytest.approx(trainer.ledger.bytes / 1e6, rel=0.02)


def test_what_the_server_took_is_said_where_it_is_much(make_trainer):
    trainer = make_trainer(stage_rounds=[1])
    trainer.train()
    for stage in trainer.stages:
        stage.totals["setup_seconds"] = 0.0
    assert "setting stages up" not in closing(trainer)
    trainer.stages[1].totals["setup_seconds"] = 90.0
    assert "of rounds and 1.5 minutes of setting stages up\n" in closing(trainer)


def test_without_evaluation_it_says_what_it_cost(make_trainer):
    trainer = make_trainer(stage_rounds=[1])
    assert "2 → 4 layers, 1 round each" in opening(trainer)
    trainer.train()
    assert closing(trainer).startswith(f"{trainer.ledger.bytes / 1e6:.2f} MB, ")


@pytest.mark.parametrize(("data", "options", "said"), [
    ({"north": 3, "south": 2}, {"partition": "natural"}, "2 clients (north 3, south 2 rows), 1 a round"),
    ({"north": 3}, {"partition": "natural"}, "1 client (north 3 rows), 1 a round"),
    ({"north": 6, "south": 2}, {"partition": "iid", "num_clients": 3}, "3 clients of 2 to 3 rows, 1 a round"),
])  # fmt: skip
def test_who_the_clients_are_is_said(make_trainer, tasks, data, options, said):
    rows = tasks.select(range(sum(data.values())))
    rows = rows.add_column("owner", [name for name, count in data.items() for _ in range(count)])
    options = {"num_clients": None, "clients_per_round": 1, "partition_column": "owner"} | options
    assert said in opening(make_trainer(train_dataset=rows, **options))


def test_a_resumed_run_is_announced_once_it_is_known_to_be_the_same(make_trainer, capsys):
    make_trainer(max_steps=3, save_strategy="steps", save_steps=1).train()
    other = make_trainer(local_steps=3)
    say_at_start(other)
    with pytest.raises(ValueError, match=r"local_steps 2 \(now 3\)"):
        other.train("last")
    assert capsys.readouterr().out == ""
    same = make_trainer()
    say_at_start(same)
    same.train("last")
    assert capsys.readouterr().out == f"{opening(make_trainer())}\nGoing on after round 3 of 4\n"


def test_a_terminal_breaks_long_lines_between_words(capsys, monkeypatch):
    text = "outputs/[bold]/:smile: " * 6
    say(text)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    say(text)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [text[:69].rstrip(), text[69:].rstrip()]
