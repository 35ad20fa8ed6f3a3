"""What a person sees of a run: one bar over all rounds, one table at each stage's end."""

import math
from collections.abc import Container

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from hf_devft.configuration import StageConfig
from hf_devft.planning import RunPlan, StagePlan


class RoundProgressCallback(TrainerCallback):
    """A bar over all rounds that names stage and round and shows the newest losses. Logs are not printed."""

    def __init__(self, stages: list[StageConfig]):
        self.stages = stages
        self.bar = None
        self.prediction_bar = None
        self.shown = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="round", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            stage = self.stages[max(math.ceil(state.epoch), 1) - 1]
            done = round((state.epoch - stage.stage + 1) * stage.rounds)
            self.bar.set_description(
                f"stage {stage.stage}/{stage.num_stages} ({stage.num_layers} layers) round {done}/{stage.rounds}",
                refresh=False,
            )
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs:
            self.shown |= {key: f"{logs[key]:.3f}" for key in ("loss", "eval_loss") if key in logs}
            self.bar.set_postfix(self.shown)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(total=len(eval_dataloader), desc="evaluating", leave=False)
            self.prediction_bar.update(1)

    def _close_prediction_bar(self, *args, **kwargs):
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None

    on_evaluate = on_predict = _close_prediction_bar

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


# Title of a column -> its value for a stage; columns without any value are left out.
_COLUMNS = {
    "stage": lambda stage: f"{stage.stage}/{stage.num_stages}" if stage.stage else "start",
    "layers": lambda stage: str(stage.num_layers),
    "rounds": lambda stage: str(stage.rounds_done),
    "loss\nsubm.": lambda stage: _number(stage.metrics.get("eval_loss"), ".3f"),
    "loss\nfull": lambda stage: _number(stage.metrics.get("eval_full_loss"), ".3f"),
    "exact\nmatch": lambda stage: _number(stage.metrics.get("eval_full_exact_match"), ".1%"),
    "accu-\nracy": lambda stage: _number(stage.metrics.get("eval_full_accuracy"), ".1%"),
    "reward\nmargin": lambda stage: _number(stage.metrics.get("eval_full_rewards/margins"), ".3f"),
    "loss\nworst": lambda stage: _number(stage.metrics.get("eval_full_worst_loss"), ".3f"),
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


def _table(title: str, titles: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in titles:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def stage_rows(stages: list[StageConfig], without: Container[str] = ()) -> tuple[list[str], list[list[str]]]:
    """(titles, with a line break where they are long; one row of text per stage)."""
    columns = {title: value for title, value in _COLUMNS.items() if title not in without}
    cells = {title: [value(stage) for stage in stages] for title, value in columns.items()}
    cells = {title: column for title, column in cells.items() if any(cell is not None for cell in column)}
    return list(cells), [[cell or "" for cell in row] for row in zip(*cells.values(), strict=True)]


def print_stages(stages: list[StageConfig]) -> None:
    """Print the table of the finished stages."""
    titles, rows = stage_rows(stages, without=_CARD_ONLY)
    table = _table(f"stage {stages[-1].stage}/{stages[-1].num_stages} finished", titles, rows)
    with tqdm.external_write_mode():  # not into the bar
        Console().print(table)


# Title of a column -> its value for a planned stage.
_PLANNED = {
    "stage": lambda plan: plan.stage,
    "layers": lambda plan: str(plan.num_layers),
    "rounds": lambda plan: str(plan.rounds),
    "values": lambda plan: _si(plan.trainable),
    "down\nB": lambda plan: _si(plan.bytes_down),
    "up\nB": lambda plan: _si(plan.bytes_up),
    "sent\nB": lambda plan: _si(plan.bytes),
    "FLOPs": lambda plan: _si(plan.flops),
    "client\nB": lambda plan: _si(plan.client_memory),
    "server\nB": lambda plan: _si(plan.server_memory),
}


def _si(value: float) -> str:
    """Three digits and a prefix, such as "1.25G"."""
    power = min(int(math.log10(value)) // 3, 6) if value >= 1 else 0
    digits = value / 1000**power
    places = max(0, 2 - int(math.log10(max(digits, 1))))
    return f"{digits:.{places}f}{' kMGTPE'[power]}".rstrip()


def print_plan(plan: RunPlan) -> None:
    """Print what a run will cost."""
    rows: list[StagePlan] = [*plan.stages, plan.total, plan.without_stages]
    Console().print(_table("plan", list(_PLANNED), [[value(row) for value in _PLANNED.values()] for row in rows]))
    Console().print(
        "values: that a client trains; down, up: to and from it in a round;\n"
        "sent, FLOPs: by all in all rounds; client, server: peak memory, estimated.\n"
        f"none: as many rounds without stages: {plan.without_stages.bytes / plan.total.bytes:.2f}x the bytes, "
        f"{plan.without_stages.flops / plan.total.flops:.2f}x the FLOPs."
    )
    if plan.total.setup_flops:
        Console().print(f"Healing and distillation on the server take about {_si(plan.total.setup_flops)} FLOPs more.")
    if not plan.measured:
        Console().print("Rows were not measured: FLOPs and memory are as if each had `max_length` tokens.")
