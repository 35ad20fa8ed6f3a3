"""The table of a run's stages, for the terminal and for model cards."""

from collections.abc import Container
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from hf_devft.configuration import StageConfig


ALL = -1  # number of the row of all stages together
# Title of a column -> its value for a stage; columns without any value are left out.
_COLUMNS = {
    "stage": lambda stage: {0: "start", ALL: "all"}.get(stage.stage, f"{stage.stage}/{stage.num_stages}"),
    "layers": lambda stage: str(stage.num_layers),
    "with an\nadapter": lambda stage: stage.adapted and str(len(stage.adapted)),
    "rounds": lambda stage: str(stage.rounds_done),
    "loss\nsubm.": lambda stage: _submodel_loss(stage),
    "loss\nfull": lambda stage: _number(stage.metrics.get("eval_full_loss"), ".3f"),
    "exact\nmatch": lambda stage: _number(stage.metrics.get("eval_full_exact_match"), ".1%"),
    "accu-\nracy": lambda stage: _number(stage.metrics.get("eval_full_accuracy"), ".1%"),
    "reward\nmargin": lambda stage: _number(stage.metrics.get("eval_full_rewards/margins"), ".3f"),
    "loss\nworst": lambda stage: _number(stage.metrics.get("eval_full_worst_loss"), ".3f"),
    "ε": lambda stage: _number(stage.totals.get("epsilon"), ".2f"),
    "MB\nsent": lambda stage: _number(stage.totals["bytes"] / 1e6, ".2f"),
    "TFLOPs": lambda stage: _number(flops / 1e12, ".2f") if (flops := stage.totals["flops"]) else None,
    "seconds": lambda stage: _number(stage.totals["seconds"], ".1f"),
    "server\nTFLOPs": lambda stage: (
        _number(flops / 1e12, ".2f") if (flops := stage.totals.get("setup_flops")) else None
    ),
    "set-up\ns": lambda stage: _number(stage.totals.get("setup_seconds"), ".1f"),
    "base\nMB": lambda stage: _number(size / 1e6, ".1f") if (size := stage.totals.get("base_bytes")) else None,
    "peak\nMB": lambda stage: _number(peak / 1e6, ".0f") if (peak := stage.totals["peak_memory"]) else None,
}
_ROOM = {"MB\nsent": 7, "TFLOPs": 6, "seconds": 7, "peak\nMB": 5}  # for what later rows may need
_CARD_ONLY = ("server\nTFLOPs", "set-up\ns", "base\nMB")  # so that a terminal of 80 columns holds the rest


def _number(value: float | None, style: str) -> str | None:
    return None if value is None else format(value, style)


def _submodel_loss(stage: StageConfig) -> str | None:
    """A dash where a submodel was not measured at its stage's end, so that the column is there from then on."""
    not_measured = "eval_full_loss" in stage.metrics and stage.num_layers < stage.full_layers
    return _number(stage.metrics.get("eval_loss"), ".3f") or ("-" if not_measured else None)


def make_table(title: str, titles: list[str], rows: list[list[str]]) -> Table:
    """Make a table for the terminal, of text; where it is too wide, the first column's is folded."""
    table = _empty_table(title_justify="left", title=title)
    for index, column in enumerate(titles):
        table.add_column(column, justify="right", no_wrap=index > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _empty_table(**options: Any) -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), **options)


def stage_table(stages: list[StageConfig], without: Container[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Make the table of some stages: (titles, with a line break where they are long; one row of text per stage)."""
    columns = {title: value for title, value in _COLUMNS.items() if title not in without}
    cells = {title: [value(stage) for stage in stages] for title, value in columns.items()}
    cells = {title: column for title, column in cells.items() if any(cell is not None for cell in column)}
    return list(cells), [[cell or "" for cell in row] for row in zip(*cells.values(), strict=True)]


class GrowingTable:
    """The table of a run's stages on the terminal, above the progress bar: a row is printed when it is there."""

    def __init__(self) -> None:
        self._titles: list[str] = []
        self._widths: list[int] = []
        self._printed = 0

    def show(self, stages: list[StageConfig]) -> None:
        """Print the rows that are new, under the columns' titles where these are.

        Args:
            stages: all rows so far, see `table_rows`.
        """
        titles, rows = stage_table(stages, without=_CARD_ONLY)
        is_new = not set(titles) <= set(self._titles)  # the first time, or where a column has its first value
        if is_new:
            columns = zip(titles, zip(*rows, strict=True), strict=True)
            self._titles = titles
            self._widths = [
                max(_ROOM.get(title, 0), *map(len, (*title.split("\n"), *cells))) for title, cells in columns
            ]
        table = _empty_table(show_header=is_new, show_edge=False)
        for title, width in zip(self._titles, self._widths, strict=True):
            table.add_column(title, justify="right", no_wrap=True, min_width=width)
        for row in rows[self._printed :]:
            cells = dict(zip(titles, row, strict=True))
            table.add_row(*(cells.get(title, "") for title in self._titles))
        self._printed = len(rows)
        with tqdm.external_write_mode():  # not into the bar
            Console().print(table)
