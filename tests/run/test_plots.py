"""The curve of a run."""

import pytest

from hf_devft.run.comparison import read_curve
from hf_devft.run.plots import plot_run


def test_another_run_is_drawn_beside(make_trainer, eval_tasks, tmp_path):
    options = {"eval_dataset": eval_tasks, "eval_strategy": "epoch", "stage_rounds": [1]}
    make_trainer(output_dir=tmp_path / "fedit", stage_layers=[4], **options | {"stage_rounds": [2]}).train()
    trainer = make_trainer(output_dir=tmp_path / "run", baseline=str(tmp_path / "fedit"), **options)
    trainer.train()
    curve = read_curve(tmp_path / "fedit")
    figure = plot_run(trainer.state.log_history, trainer.ledger, trainer.stages, {"fedit": curve})
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["fedit, full depth"].get_ydata().tolist() == [point.loss for point in curve]
    assert {"2 layers", "4 layers", "full depth"} <= lines.keys()
    assert figure.axes[0].get_yscale() == "log"


def test_a_baseline_that_is_no_run_is_refused_before_any_work(make_trainer, tmp_path):
    with pytest.raises((ValueError, OSError), match=str(tmp_path / "none")):
        make_trainer(baseline=str(tmp_path / "none"))
