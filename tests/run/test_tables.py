from rich.console import Console
from test_devft_config import stage_config

from hf_devft.run.tables import GrowingTable, make_table, stage_table


TOTALS = {
    "bytes": 47.84e6,
    "flops": 1.77e12,
    "seconds": 129.2,
    "peak_memory": 957e6,
    "setup_seconds": 1.0,
    "base_bytes": 4e6,
}
METRICS = {"eval_loss": 0.203, "eval_full_loss": 0.207, "eval_full_exact_match": 1.0}


def stages():
    return [stage_config(stage=stage, totals=TOTALS, metrics=METRICS) for stage in (1, 2)]


def test_the_table_fits_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = GrowingTable()
    table.show(stages()[:1])
    table.show(stages())
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "100.0%" in printed
    assert Console().width == 80


def test_a_row_is_printed_once_under_its_titles(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    first, second = stages()
    late = stage_config(stage=2, totals=TOTALS | {"bytes": 1191.4e6}, metrics=METRICS)
    table = GrowingTable()
    table.show([first])
    table.show([first, late])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines] == ["loss", "stage", lines[2].strip(), "1/2", "2/2"]
    assert len(set(map(len, lines))) <= 2  # the first line of titles ends earlier
    table = GrowingTable()
    table.show([stage_config(totals=TOTALS, metrics={})])
    table.show([stage_config(totals=TOTALS, metrics={}), second])
    said = capsys.readouterr().out
    assert said.count("stage") == 2  # titles again, as there are new columns
    assert said.count("1/2") == 1


def test_columns_without_values_are_left_out():
    titles, rows = stage_table([stage_config(totals=TOTALS, metrics={})])
    assert "exact\nmatch" not in titles
    assert len(rows) == 1
    assert len(rows[0]) == len(titles)


def test_nothing_is_said_of_the_memory_before_any_round():
    start = stage_config(stage=0, totals=TOTALS | {"peak_memory": 0}, metrics=METRICS)
    titles, rows = stage_table([start, *stages()])
    assert [row[titles.index("peak\nMB")] for row in rows] == ["", "957", "957"]


def test_a_submodel_that_was_not_measured_has_a_dash_and_no_titles_again(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    first = stage_config(stage=1, num_layers=2, totals=TOTALS, metrics={"eval_full_loss": 2.4})
    last = stage_config(stage=2, num_layers=4, totals=TOTALS, metrics={"eval_loss": 1.1, "eval_full_loss": 1.1})
    table = GrowingTable()
    table.show([first])
    table.show([first, last])
    printed = capsys.readouterr().out
    assert printed.count("subm.") == 1
    assert " - " in next(line for line in printed.splitlines() if "1/2" in line)


def test_numbers_are_whole_where_a_name_is_long(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    Console().print(make_table("runs", ["run", "MB", "seconds"], [["outputs/" + "long/" * 9, "143.52", "12345.6"]]))
    printed = capsys.readouterr().out
    assert "143.52" in printed
    assert "12345.6" in printed
    assert "…" not in printed
