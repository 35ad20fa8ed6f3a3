"""Trackers are told of each stage and of each client."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def options(eval_tasks, tasks):
    rows = {"north": tasks.select(range(60)), "south": tasks.select(range(60, 120))}
    return {
        "eval_dataset": eval_tasks,
        "eval_strategy": "epoch",
        "num_clients": None,
        "clients_per_round": 2,
        "train_dataset": rows,
    }


def test_tensorboard_has_a_series_for_each(make_trainer, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(report_to="tensorboard", **options)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    series = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    rounds = [len(series[f"train/stage-{stage}/loss"]) for stage in (1, 2)]
    assert rounds == [stage.rounds for stage in trainer.stages]
    assert len(series["train/client-north/loss"]) == len(series["train/client-south/loss"]) == sum(rounds)
    step, loss = series["train/loss"][-1]
    mean = sum(series[f"train/client-{name}/loss"][-1][1] for name in ("north", "south")) / 2
    assert loss == pytest.approx(mean, rel=1e-4)
    assert series["train/stage-2/loss"][-1] == (step, loss)
    assert {"eval/stage-1/loss", "eval/loss"} <= series.keys()
    assert not any("/" in key for row in trainer.state.log_history for key in row)


def test_trackio_is_told_the_same(make_trainer, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    make_trainer(report_to="trackio", project="series", **options).train()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "trackio").glob("series.db*"))
    assert all(f"train/{name}/loss".encode() in stored for name in ("stage-2", "client-north"))


def test_a_private_run_tells_nothing_of_a_client(make_trainer, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    private = {"dp_noise_multiplier": 1.0, "dp_clipping_norm": 1.0, "dp_delta": 0.01}
    make_trainer(report_to="tensorboard", **options | private).train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "train/epsilon" in tags
    assert not any(
        "client" in tag or (tag.startswith("train/") and tag.endswith(("loss", "grad_norm"))) for tag in tags
    )
