"""The table of a run's stages, for the terminal and for model cards."""

from collections.abc import Container

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from hf_devft.configuration import StageConfig


# Title of a column -> its value for a stage; columns without any value are left out.
_COLUMNS = {
    "stage": lambda stage: f"{stage.stage}/{stage.num_stages}" if stage.stage else "start",
    "layers": lambda stage: str(stage.num_layers),
    "with an\nadapter": lambda stage: stage.adapted and str(len(stage.adapted)),
    "rounds": lambda stage: str(stage.rounds_done),
    "loss\nsubm.": lambda stage: _number(stage.metrics.get("eval_loss"), ".3f"),
    "loss\nfull": lambda stage: _number(stage.metrics.get("eval_full_loss"), ".3f"),
    "exact\nmatch": lambda stage: _number(stage.metrics.get("eval_full_exact_match"), ".1%"),
    "accu-\nracy": lambda stage: _number(stage.metrics.get("eval_full_accuracy"), ".1%"),
    "reward\nmargin": lambda stage: _number(stage.metrics.get("eval_full_rewards/margins"), ".3f"),
    "loss\nworst": lambda stage: _number(stage.metrics.get("eval_full_worst_loss"), ".3f"),
    "ε": lambda stage: _number(stage.totals.get("epsilon"), ".2f"),
    "MB\nsent": lambda stage: _number(stage.totals["bytes"] / 1e6, ".2f"),
    "TFLOPs": lambda stage: _number(stage.totals["flops"] / 1e12, ".2f"),
    "seconds": lambda stage: _number(stage.totals["seconds"], ".1f"),
    "server\nTFLOPs": lambda stage: (
        _number(flops / 1e12, ".2f") if (flops := stage.totals.get("setup_flops")) else None
    ),
    "set-up\ns": lambda stage: _number(stage.totals.get("setup_seconds"), ".1f"),
    "base\nMB": lambda stage: _number(stage.totals.get("base_bytes", 0) / 1e6, ".1f"),
    "peak\nMB": lambda stage: _number(stage.totals["peak_memory"] / 1e6, ".0f"),
}
_CARD_ONLY = ("server\nTFLOPs", "set-up\ns", "base\nMB")  # so that a terminal of 80 columns holds the rest


def _number(value: float | None, style: str) -> str | None:
    return None if value is None else format(value, style)


def make_table(title: str, titles: list[str], rows: list[list[str]]) -> Table:
    """Make a table for the terminal, of text."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in titles:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def stage_table(stages: list[StageConfig], without: Container[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Make the table of some stages: (titles, with a line break where they are long; one row of text per stage)."""
    columns = {title: value for title, value in _COLUMNS.items() if title not in without}
    cells = {title: [value(stage) for stage in stages] for title, value in columns.items()}
    cells = {title: column for title, column in cells.items() if any(cell is not None for cell in column)}
    return list(cells), [[cell or "" for cell in row] for row in zip(*cells.values(), strict=True)]


def print_stages(stages: list[StageConfig]) -> None:
    """Print the table of the finished stages, above the progress bar."""
    titles, rows = stage_table(stages, without=_CARD_ONLY)
    table = make_table(f"stage {stages[-1].stage}/{stages[-1].num_stages} finished", titles, rows)
    with tqdm.external_write_mode():  # not into the bar
        Console().print(table)
