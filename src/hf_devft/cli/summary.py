"""What a person reads before a run and after it."""

from hf_devft.configuration import StageConfig
from hf_devft.embedded import portable_name
from hf_devft.models.layout import AdapterLayout
from hf_devft.run.plan import planned_traffic
from hf_devft.trainer.mixin import DevFTMixin


def opening(trainer: DevFTMixin) -> str:
    """Say in two lines what will be trained, and what it will send."""
    args, run = trainer.args, trainer.run
    base = trainer.model.get_base_model().config.name_or_path
    megabytes = sum(planned_traffic(args, _layout(trainer, stage), stage.rounds) for stage in run.stages) / 1e6
    return (
        f"{portable_name(base) or 'the model'}, {run.stages[-1].full_layers} layers: "
        f"{len(run.clients.rows)} clients, {args.clients_per_round} a round, {args.federated_method}\n"
        f"{_stages(run.stages)}: about {megabytes:.3g} MB to send; results in {args.output_dir}/"
    )


def closing(trainer: DevFTMixin) -> str:
    """Say what the run has brought, where that is, and what to do next."""
    run, folder = trainer.run, trainer.args.output_dir
    start, end, totals = run.start_metrics or {}, run.stages[-1].metrics, run.ledger.totals()
    changes = [
        f"{name} {start[key]:{style}} → {end[key]:{style}}" if key in start else f"{name} {end[key]:{style}}"
        for key, (name, style) in _BROUGHT.items()
        if key in end
    ]
    cost = f"{totals['bytes'] / 1e6:.2f} MB, {_minutes(totals['seconds'])}"
    brought = f"{', '.join(changes)} at full depth for {cost}" if changes else cost
    return f"{brought}\nAdapters, model card and plot are in {folder}/\nNext: devft compare {folder} OTHER_RUN"


# Of the last stage and the start: what each is called.
_BROUGHT = {
    "eval_full_loss": ("loss", ".3f"),
    "eval_full_exact_match": ("exact match", ".1%"),
    "eval_full_accuracy": ("accuracy", ".1%"),
}


def _layout(trainer: DevFTMixin, stage: StageConfig) -> AdapterLayout:
    """As large as a stage's adapter: that of its first layers, as layers are alike."""
    adapter = trainer.run.adapter
    kept = range(stage.num_layers) if stage.adapted is None else stage.adapted
    layers = {key: adapter.names.split(key) for key in adapter.state}
    keys = [key for key, layer in layers.items() if layer is None or layer[0] in kept]
    return AdapterLayout(tuple(keys), tuple(adapter.state[key].shape for key in keys))


def _stages(stages: list[StageConfig]) -> str:
    depths = " → ".join(str(len(stage.adapted) if stage.adapted else stage.num_layers) for stage in stages)
    rounds = sorted({stage.rounds for stage in stages})
    each = f"{rounds[0]} rounds" + (" each" if len(stages) > 1 else "")
    return f"{depths} layers, {each if len(rounds) == 1 else ' + '.join(str(s.rounds) for s in stages) + ' rounds'}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
