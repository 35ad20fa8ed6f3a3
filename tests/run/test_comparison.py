"""Runs side by side."""

import pytest

from hf_devft.run.comparison import Point, common_loss, reached, read_curve


def test_runs_are_compared_at_a_loss_that_all_have_reached():
    curves = [
        [Point(loss, index, 10.0 * index, 0, 0) for index, loss in enumerate(run)] for run in ([3, 2, 1], [3, 2])
    ]
    assert common_loss(curves) == 2
    assert reached(curves[0], 2).megabytes == 10


def test_a_curve_has_what_the_server_did_until_then(make_trainer, eval_tasks, tmp_path):
    trainer = make_trainer(
        eval_dataset=eval_tasks, calibration_dataset=eval_tasks, eval_strategy="steps", eval_steps=1,
        eval_on_start=True, distillation_steps=2,
    )  # fmt: skip
    trainer.train()
    start, *points = read_curve(tmp_path / "run")
    assert (start.seconds, start.server_teraflops) == (0, 0)
    first, second = (stage.totals for stage in trainer.stages)
    end = points[-1]
    assert end.server_teraflops == pytest.approx(second["setup_flops"] / 1e12)
    assert end.seconds == pytest.approx(
        sum(stage[name] for stage in (first, second) for name in ("seconds", "setup_seconds"))
    )
    before = next(point for point in points if point.rounds == trainer.stages[0].rounds)
    assert before.server_teraflops == 0, "the second stage is taught after it"
