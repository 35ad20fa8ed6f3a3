"""The table of what a run will cost."""

import math

from rich.console import Console

from hf_devft.run.plan import RunPlan, StagePlan
from hf_devft.run.tables import make_table


# Title of a column -> its value for a planned stage; units are those of a run's table.
_PLANNED = {
    "stage": lambda plan: plan.stage,
    "layers": lambda plan: str(plan.num_layers),
    "rounds": lambda plan: str(plan.rounds),
    "million\nvalues": lambda plan: _digits(plan.trainable / 1e6),
    "MB\ndown": lambda plan: _digits(plan.bytes_down / 1e6),
    "MB\nup": lambda plan: _digits(plan.bytes_up / 1e6),
    "MB\nsent": lambda plan: _digits(plan.bytes / 1e6),
    "TFLOPs": lambda plan: _digits(plan.flops / 1e12),
    "client\nMB": lambda plan: _digits(plan.client_memory / 1e6),
    "server\nMB": lambda plan: _digits(plan.server_memory / 1e6),
}


_WORTH_IT = 0.9  # part of a client's memory from which checkpointing is not spoken of (our choice)


def _digits(value: float) -> str:
    """Three digits, or all before the point, such as "0.0125", "1.25" or "12500"."""
    places = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:.{max(places, 0)}f}"


def print_plan(plan: RunPlan, name: str) -> None:
    """Print what a run will cost.

    Args:
        name: title of the table.
    """
    console = Console(highlight=False)
    has_stages = len(plan.stages) > 1
    rows: list[StagePlan] = [*plan.stages, plan.total, plan.without_stages] if has_stages else plan.stages
    round_bytes = max(stage.bytes / stage.rounds for stage in plan.stages)
    console.print(make_table(name, list(_PLANNED), [[value(row) for value in _PLANNED.values()] for row in rows]))
    of_all = "" if plan.num_clients is None else f" of {plan.num_clients}"
    console.print(
        "values: that a client trains; down, up: to and from it in a round;\n"
        "sent, TFLOPs: by all in all rounds; client, server: peak memory, estimated,\n"
        "above what Python and PyTorch take before there is a model.\n"
        f"A round's {plan.clients_per_round}{of_all} clients: up to {_digits(round_bytes / 1e6)} MB, "
        "which over a network the server holds."
    )
    if has_stages:
        console.print(
            f"none: as many rounds without stages: {plan.without_stages.bytes / plan.total.bytes:.2f}x the bytes, "
            f"{plan.without_stages.flops / plan.total.flops:.2f}x the FLOPs."
        )
    checkpointed = plan.total.client_memory_checkpointed
    if checkpointed < _WORTH_IT * plan.total.client_memory:
        console.print(
            f"With --activation_checkpointing true a client takes {_digits(checkpointed / 1e6)} MB at most, and "
            "about a quarter more time."
        )
    if plan.total.setup_flops:
        console.print(
            "Bridges, healing and distillation on the server take about "
            f"{_digits(plan.total.setup_flops / 1e12)} TFLOPs more."
        )
    if plan.epsilon is not None:
        console.print(
            f"Differentially private for each {plan.protects}: ε = {plan.epsilon:.2f} at δ = {plan.delta:g} in the "
            f"end, with a noise multiplier of {plan.noise_multiplier:.3g}."
        )
    elif plan.protects is not None:
        console.print("Differentially private; ε depends on the clients and their rows, which were not read.")
    if not plan.has_like_messages:
        console.print("Bytes are of a whole adapter each way: this method sends more or less.")
    if not plan.measured:
        console.print("Rows were not measured: FLOPs and memory are as if each had `max_length` tokens.")
