"""What a person reads before a run and after it."""

from rich.console import Console
from transformers import TrainerCallback

from hf_devft.configuration import StageConfig
from hf_devft.embedded import portable_name
from hf_devft.federation.partition import ClientData
from hf_devft.models.layout import AdapterLayout
from hf_devft.run.planned_messages import planned_traffic
from hf_devft.stages.transfer import keep_layers, layers_with_adapter
from hf_devft.trainer.mixin import DevFTMixin


def say(text: str) -> None:
    """Print text, whose long lines a terminal breaks between words."""
    console = Console()
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=not console.is_terminal)


def say_at_start(trainer: DevFTMixin) -> None:
    """Have the main process print `opening` once nothing speaks against the run, not even what it goes on from."""
    trainer.callback_handler.callbacks.insert(0, _Opening(trainer))  # before the bar


class _Opening(TrainerCallback):
    def __init__(self, trainer: DevFTMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            say(opening(self._trainer))


def opening(trainer: DevFTMixin) -> str:
    """Say what will be trained, what it will send, if it runs to its end, where the results go, and where it goes on
    from; each on a line."""
    args, run = trainer.args, trainer.run
    base = trainer.model.get_base_model().config.name_or_path
    done, planned = trainer.state.global_step, run.num_rounds
    return (
        f"{portable_name(base) or 'the model'}, {run.stages[-1].full_layers} layers: "
        f"{_clients(run.clients)}, {args.clients_per_round} a round, {args.federated_method}\n"
        f"{_stages(run.stages)}: about {_megabytes(trainer):.3g} MB to send\n"
        f"Results in {args.output_dir}/" + (f"\nGoing on after round {done} of {planned}" if done else "")
    )


def closing(trainer: DevFTMixin) -> str:
    """Say what the run has brought, where that is, and what to do next."""
    run, folder = trainer.run, trainer.args.output_dir
    start, totals = run.start_metrics or {}, run.ledger.totals()
    end = next((stage.metrics for stage in reversed(run.stages) if stage.rounds_done), {})
    changes = [
        f"{name} {start[key]:{style}} → {end[key]:{style}}" if key in start else f"{name} {end[key]:{style}}"
        for key, (name, style) in _BROUGHT.items()
        if key in end
    ]
    cost = f"{totals['bytes'] / 1e6:.2f} MB, {_minutes(totals['seconds'])} of rounds"
    setup = sum(stage.totals.get("setup_seconds", 0.0) for stage in run.stages)
    if setup > max(_WORTH_SAYING * totals["seconds"], 1.0):
        cost += f" and {_minutes(setup)} of setting stages up"
    planned, state = sum(stage.rounds for stage in run.stages), trainer.state
    if state.global_step == state.max_steps < planned:
        by = "max_steps" if trainer.args.max_steps == state.max_steps else "dp_target_epsilon"
        cost += f"; ended by {by}, {state.max_steps} of {planned} rounds"
    brought = [f"{', '.join(changes)} at full depth", f"for {cost}"] if changes else [cost]
    lines = [*brought, f"Adapters, model card and plot are in {folder}/"]
    if "eval_full_loss" in end:
        lines.append(f"Next: devft compare {folder} OTHER_RUN")
    return "\n".join(lines)


_WORTH_SAYING = 0.1  # part of the rounds' seconds (our choice)

# Of the last stage and the start: what each is called.
_BROUGHT = {
    "eval_full_loss": ("loss", ".3f"),
    "eval_full_exact_match": ("exact match", ".1%"),
    "eval_full_accuracy": ("accuracy", ".1%"),
}


def _megabytes(trainer: DevFTMixin) -> float:
    """Of all adapters that the run's rounds will send."""
    start, total, clients = 0, 0.0, len(trainer.run.clients.rows)
    for stage in trainer.run.stages:
        rounds = range(start, min(trainer.run.num_rounds, start := start + stage.rounds))
        total += planned_traffic(trainer.args, _layout(trainer, stage), clients, rounds) if rounds else 0.0
    return total / 1e6


def _layout(trainer: DevFTMixin, stage: StageConfig) -> AdapterLayout:
    """As large as a stage's adapter: as large a part of the layers that have one, as they are alike."""
    adapter = trainer.run.adapter
    adapted = sorted(layers_with_adapter(adapter.state, adapter.names))
    kept = adapted[: max(1, round(len(adapted) * stage.num_trained / stage.full_layers))]
    state = keep_layers(adapter.state, adapter.names, kept)
    return AdapterLayout(tuple(state), tuple(tensor.shape for tensor in state.values()))


def _stages(stages: list[StageConfig]) -> str:
    depths = " → ".join(str(stage.num_trained) for stage in stages)
    rounds = sorted({stage.rounds for stage in stages})
    each = _count(rounds[0], "round") + (" each" if len(stages) > 1 else "")
    return f"{depths} layers, {each if len(rounds) == 1 else ' + '.join(str(s.rounds) for s in stages) + ' rounds'}"


_NAMED = 3  # clients, at most: as many as a line holds


def _clients(clients: ClientData) -> str:
    count = _count(len(clients.rows), "client")
    if not any(clients.examples):  # who are elsewhere, and have not said it yet
        return count
    if clients.partition not in ("iid", "dirichlet") and len(clients.rows) <= _NAMED:
        rows = [f"{name} {examples}" for name, examples in zip(clients.names, clients.examples, strict=True)]
        return f"{count} ({', '.join(rows)} rows)"
    least, most = min(clients.examples), max(clients.examples)
    return f"{count} of {least}{'' if least == most else f' to {most}'} rows"


def _minutes(seconds: float) -> str:
    if seconds >= 60:
        return f"{seconds / 60:.1f} minutes"
    return _count(round(seconds), "second")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
