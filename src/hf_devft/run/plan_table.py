"""The table of what a run will cost."""

import math

from rich.console import Console

from hf_devft.run.plan import RunPlan, StagePlan
from hf_devft.run.tables import make_table


# Title of a column -> its value for a planned stage.
_PLANNED = {
    "stage": lambda plan: plan.stage,
    "layers": lambda plan: str(plan.num_layers),
    "rounds": lambda plan: str(plan.rounds),
    "values": lambda plan: _si(plan.trainable),
    "down": lambda plan: _si(plan.bytes_down, "B"),
    "up": lambda plan: _si(plan.bytes_up, "B"),
    "sent": lambda plan: _si(plan.bytes, "B"),
    "FLOPs": lambda plan: _si(plan.flops),
    "client": lambda plan: _si(plan.client_memory, "B"),
    "server": lambda plan: _si(plan.server_memory, "B"),
}


_WORTH_IT = 0.9  # part of a client's memory from which checkpointing is not spoken of (our choice)


def _si(value: float, unit: str = "") -> str:
    """Three digits and a prefix, such as "1.25G" or "1.25 GB"."""
    power = min(int(math.log10(value)) // 3, 6) if value >= 1 else 0
    digits = value / 1000**power
    places = max(0, 2 - int(math.log10(max(digits, 1))))
    prefix = " kMGTPE"[power].strip() + unit
    return f"{digits:.{places}f}{' ' if unit else ''}{prefix}"


def print_plan(plan: RunPlan, name: str) -> None:
    """Print what a run will cost.

    Args:
        name: title of the table.
    """
    has_stages = len(plan.stages) > 1
    rows: list[StagePlan] = [*plan.stages, plan.total, plan.without_stages] if has_stages else plan.stages
    round_bytes = max(stage.bytes / stage.rounds for stage in plan.stages)
    Console().print(make_table(name, list(_PLANNED), [[value(row) for value in _PLANNED.values()] for row in rows]))
    Console().print(
        "values: that a client trains; down, up: to and from it in a round;\n"
        "sent, FLOPs: by all in all rounds; client, server: peak memory, estimated,\n"
        "above what Python and PyTorch take before there is a model.\n"
        f"A round's {plan.clients_per_round} of {plan.num_clients} clients: up to {_si(round_bytes, 'B')}, which over "
        "a network the server holds."
    )
    if has_stages:
        Console().print(
            f"none: as many rounds without stages: {plan.without_stages.bytes / plan.total.bytes:.2f}x the bytes, "
            f"{plan.without_stages.flops / plan.total.flops:.2f}x the FLOPs."
        )
    if plan.total.client_memory_checkpointed < _WORTH_IT * plan.total.client_memory:
        Console().print(
            f"With --activation_checkpointing true a client takes {_si(plan.total.client_memory_checkpointed, 'B')} "
            "at most, and about a quarter more time."
        )
    if plan.total.setup_flops:
        Console().print(
            f"Bridges, healing and distillation on the server take about {_si(plan.total.setup_flops, 'FLOPs')} more."
        )
    if plan.epsilon is not None:
        Console().print(
            f"Differentially private for each {plan.protects}: ε = {plan.epsilon:.2f} at δ = {plan.delta:g} in the "
            f"end, with a noise multiplier of {plan.noise_multiplier:.3g}."
        )
    elif plan.protects is not None:
        Console().print("Differentially private; ε depends on how many rows each client has, which were not read.")
    if not plan.measured:
        Console().print("Rows were not measured: FLOPs and memory are as if each had `max_length` tokens.")
