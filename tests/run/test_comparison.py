"""Runs side by side."""

import json
import shutil

import pytest

from hf_devft.files import write_json
from hf_devft.run.comparison import Point, common_loss, reached, read_curve


def test_runs_are_compared_at_a_loss_that_all_have_reached():
    curves = [[Point(loss, index, 10 * index, 0, 0) for index, loss in enumerate(run)] for run in ([3, 2, 1], [3, 2])]
    assert common_loss(curves) == 2
    assert reached(curves[0], 2).bytes == 10


def test_a_loss_that_is_not_finite_is_no_point(make_trainer, eval_tasks, tmp_path):
    make_trainer(eval_dataset=eval_tasks, eval_strategy="epoch", eval_on_start=True).train()
    path = tmp_path / "run" / "trainer_state.json"
    state = json.loads(path.read_text())
    evaluated = [row for row in state["log_history"] if "eval_full_loss" in row or "eval_loss" in row]
    for row in evaluated[:-1]:
        row |= {key: float("nan") for key in ("eval_full_loss", "eval_loss") if key in row}
    write_json(path, state)
    assert len(read_curve(tmp_path / "run")) == 1
    evaluated[-1] |= {key: float("nan") for key in ("eval_full_loss", "eval_loss") if key in evaluated[-1]}
    write_json(path, state)
    with pytest.raises(ValueError, match="has no finite evaluation at full depth: its loss is NaN"):
        read_curve(tmp_path / "run")


def test_a_curve_has_what_the_server_did_until_then(make_trainer, eval_tasks, tmp_path):
    trainer = make_trainer(
        eval_dataset=eval_tasks, calibration_dataset=eval_tasks, eval_strategy="steps", eval_steps=1,
        eval_on_start=True, distillation_steps=2,
    )  # fmt: skip
    trainer.train()
    start, *points = read_curve(tmp_path / "run")
    assert (start.seconds, start.server_flops) == (0, 0)
    first, second = (stage.totals for stage in trainer.stages)
    end = points[-1]
    assert end.server_flops == second["setup_flops"] > 0
    assert end.seconds == pytest.approx(
        sum(stage[name] for stage in (first, second) for name in ("seconds", "setup_seconds"))
    )
    before = next(point for point in points if point.rounds == trainer.stages[0].rounds)
    assert before.server_flops == 0, "the second stage is taught after it"
    shutil.rmtree(tmp_path / "run" / "stage-1")
    assert read_curve(tmp_path / "run" / "stage-2") == read_curve(tmp_path / "run") == [start, *points]


def test_what_the_server_took_before_a_stop_counts(make_trainer, eval_tasks, tmp_path):
    options = {
        "eval_dataset": eval_tasks, "calibration_dataset": eval_tasks, "eval_strategy": "epoch",
        "distillation_steps": 2, "save_strategy": "steps", "save_steps": 1, "stage_rounds": [2],
    }  # fmt: skip
    make_trainer(max_steps=3, **options).train()  # a round into the second stage
    path = tmp_path / "run" / "checkpoint-3" / "devft_state.json"
    state = json.loads(path.read_text())
    taken = state["stages"][1]["totals"]["setup_seconds"]
    state["stages"][1]["totals"]["setup_seconds"] = taken + 100
    write_json(path, state)
    trainer = make_trainer(**options)
    trainer.train(resume_from_checkpoint=str(path.parent))
    assert trainer.stages[1].totals["setup_seconds"] > taken + 100
    assert read_curve(tmp_path / "run")[-1].seconds > taken + 100
