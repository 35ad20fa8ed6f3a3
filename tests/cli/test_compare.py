"""`devft compare`."""

import pytest

from hf_devft.cli.compare import main
from hf_devft.run.comparison import Point


@pytest.mark.parametrize("same_rows", [True, False])
def test_runs_on_other_rows_are_compared_with_a_word_of_warning(
    make_trainer, eval_tasks, tmp_path, capsys, monkeypatch, same_rows
):
    monkeypatch.chdir(tmp_path)
    options = {"eval_on_start": True, "stage_layers": [4], "stage_rounds": [1]}
    rows = {"one": eval_tasks, "two": eval_tasks if same_rows else eval_tasks.select([0])}
    for name, own in rows.items():
        make_trainer(output_dir=tmp_path / name, eval_dataset=own, **options).train()
    main(list(rows), "compare.png")
    said = capsys.readouterr().out
    assert ("their losses cannot be compared" in said) != same_rows
    assert ("1.00" in said) == same_rows, "no ratio of what cannot be compared"
    assert "server" in said
    assert (tmp_path / "compare.png").exists()


RUNS = (["first"], ["second"])


def test_fewer_bytes_are_those_of_the_first_over_the_others(monkeypatch, tmp_path, capsys):
    def curve(run):
        sent = {"first": 300, "second": 100}[run]
        common = {"server_flops": 0.0, "seconds": 1.0}
        return [Point(rounds=0, loss=4.0, bytes=0, flops=0.0, **common),
                Point(rounds=2, loss=2.0, bytes=sent, flops=1e12, **common)]  # fmt: skip

    monkeypatch.setattr("hf_devft.cli.compare.read_curve", curve)
    main(["first", "second"], str(tmp_path / "compare.png"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-1] for row in rows if row[:1] in RUNS and len(row) > 1] == ["1.00", "3.00"]


def test_a_run_without_a_finished_stage_is_said_to_be_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="one has no finished stage"):
        main([str(tmp_path / "one"), str(tmp_path / "two")], "compare.png")
