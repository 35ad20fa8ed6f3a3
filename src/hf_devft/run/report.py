"""What a finished stage leaves behind: its folder, card, plot and table."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import PretrainedConfig

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.configuration.stage_folder import PLOT
from hf_devft.embedded import portable_name
from hf_devft.federation.ledger import Ledger
from hf_devft.federation.partition import ClientData
from hf_devft.federation.privacy import Accountant
from hf_devft.federation.wire import is_lossy
from hf_devft.hub.model_card import CardContext, model_card
from hf_devft.models.initialisation import moves_weights
from hf_devft.models.layout import State
from hf_devft.run.artifacts import save_stage
from hf_devft.run.comparison import Point
from hf_devft.run.tables import ALL, stage_table
from hf_devft.tasks import TASKS, task_named


@dataclass(frozen=True)
class StageResult:
    """What a stage came to: all that its folder, its card, plot and tables are made from.

    Attributes:
        record: its record, with metrics and totals.
        full, compact: its full-depth adapter and its submodel's, as plain PEFT has them.
    """

    record: StageConfig
    full: tuple[PeftConfig, State]
    compact: tuple[PeftConfig, State]


@dataclass
class RunReport:
    """Writes and shows the results of a run's stages.

    Attributes:
        output_dir: of the run.
        processor: tokenizer or the like, saved beside the adapters.
        base_name, base_revision: of the base, where it has a name.
        setup: {what: value} of the federation, see `describe_setup`.
        evaluation_rows: how many the metrics were measured on.
        simulated: whether the clients are, in this job.
        labels: of the model's classes, in order; None where there are none.
        repo_id: the repository that is pushed to, or None.
        baseline: {name: how its loss fell} of another run, for the plot.
        metadata: of the card: license, language, datasets, and whom privacy is for.
    """

    output_dir: str
    processor: Any
    base_name: str | None
    base_revision: str | None
    setup: dict[str, Any]
    evaluation_rows: int
    simulated: bool
    labels: list[str] | None = None
    repo_id: str | None = None
    baseline: dict[str, list[Point]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: DevFTConfig, base: PretrainedConfig, **others: Any) -> "RunReport":
        """Make the report of a run on the base with this config.

        Args:
            others: the attributes that neither says.
        """
        has_classes = task_named(args.task).classes is not None
        return cls(
            output_dir=args.output_dir,
            base_name=portable_name(base.name_or_path) or None,
            base_revision=getattr(base, "_commit_hash", None),
            labels=[base.id2label[index] for index in range(base.num_labels)] if has_classes else None,
            metadata={name: getattr(args, f"card_{name}") for name in ("license", "language", "datasets")}
            | {"protects_records": args.protects_records},
            **others,
        )

    def write(
        self,
        result: StageResult,
        rows: list[StageConfig],
        log_history: list[dict],
        ledger: Ledger,
        save_state: Callable[[Path], None],
    ) -> None:
        """Write a stage's folder, `stage-N/`, and the root anew.

        Args:
            result: of the newest stage.
            rows: of the table: the finished stages' records, see `table_rows`.
            log_history: the Trainer's, for the plot.
            save_state: writes what a run needs to go on with the next stage, ledger included.
        """
        from hf_devft.run.plots import plot_run  # here, as matplotlib takes long to import

        stage = result.record
        stage.base_model_name_or_path, stage.base_model_revision = self.base_name, self.base_revision
        stage.labels = self.labels
        finished = [row for row in rows if row.stage > 0]
        figure = plot_run(log_history, ledger, finished, self.baseline)
        imports, load = TASKS[stage.task].snippet(self.base_name, self.labels)
        context = CardContext(
            model_name=Path(self.output_dir).absolute().name,
            source=self.repo_id or self.output_dir,
            plot=PLOT,
            setup=self.setup,
            table=stage_table(rows),
            evaluation=f"{self.evaluation_rows} held-out rows" if self.evaluation_rows else "no data",
            simulated=self.simulated,
            imports=imports,
            load=load,
            **self.metadata,
        )

        def write_extras(folder: Path) -> None:
            figure.savefig(folder / PLOT, dpi=120)
            save_state(folder)

        def write_card(folder: Path, location: str) -> None:
            # On the Hub, the root at the stage's tag is the stage, and so is the copy in its folder.
            where = f'"{location}"' if self.repo_id is None else f'"{self.repo_id}", revision="stage-{stage.stage}"'
            model_card(finished, context, where).save(folder / "README.md")

        save_stage(self.output_dir, stage, result.full, result.compact, self.processor, write_extras, write_card)


def table_rows(finished: list[StageConfig], start_metrics: dict[str, float] | None) -> list[StageConfig]:
    """Put a stage 0, which stands for the start, before the finished stages, where the start was evaluated; and after
    the last of several stages, a row of all of them together."""
    last, rows = finished[-1], list(finished)
    whole: dict[str, Any] = {"num_layers": last.full_layers, "adapted": None}
    if start_metrics is not None:
        nothing = Ledger().totals()
        rows.insert(0, replace(last, stage=0, rounds_done=0, totals=nothing, metrics=start_metrics, **whole))
    if last.stage == last.num_stages > 1:
        spent, rounds = [stage.totals for stage in finished], sum(stage.rounds_done for stage in finished)
        totals = {key: _together(key, [each[key] for each in spent if key in each]) for key in last.totals}
        metrics = {key: value for key, value in last.metrics.items() if key != "eval_loss"}
        rows.append(replace(last, stage=ALL, rounds_done=rounds, totals=totals, metrics=metrics, **whole))
    return rows


def _together(key: str, values: list[float]) -> float:
    """A total of all stages by those of each."""
    if key in ("peak_memory", "setup_peak_memory", "epsilon"):  # ε is of all rounds until then
        return max(values)
    return 0.0 if key == "base_bytes" else sum(values)


def describe_setup(
    args: DevFTConfig, clients: ClientData, peft_config: PeftConfig, accountant: Accountant | None = None
) -> dict[str, Any]:
    """Describe the federation's set-up, as a card shows it: {what: value}.

    Args:
        accountant: of a run that is differentially private.
    """
    sizes, network = [size for size in clients.examples if size], clients.elsewhere is not None
    options = ", ".join(f"{name} {value}" for name, value in (args.federated_method_kwargs or {}).items())
    special = {
        "what travels": f"{args.wire_dtype}, {args.upload_fraction:.0%} of a client's changes"
        if is_lossy(args.wire_dtype, args.upload_fraction) else None,
        "submodels": _teaching(args),
        "where layers come back": f"{args.distillation_steps} steps of distillation on the server's texts"
        if args.distillation_steps else None,
        "differential privacy": None if accountant is None else _privacy(args, accountant),
        "aggregation": "secure: the server sees only sums of updates" if args.secure_aggregation else None,
        "participants": None if args.client_selection == "uniform" else args.client_selection,
    }  # fmt: skip
    return {
        "federated method": args.federated_method + (f" ({options})" if options else ""),
        "clients": len(clients.rows),
        "clients per round": args.clients_per_round,
        "partition": f"{clients.partition}, on its own machine, over a network" if network else clients.partition,
        "examples per client": f"{min(sizes)} to {max(sizes)}" if accountant is None else "untold",
        "local steps": args.local_steps,
        "batch size": args.train_batch_size * args.gradient_accumulation_steps,
        "adapter": _adapter(peft_config),
        "seed": args.seed,
    } | {name: value for name, value in special.items() if value is not None}


def _privacy(args: DevFTConfig, accountant: Accountant) -> str:
    """Describe what makes a run private."""
    norm = args.dp_clipping_norm
    if args.protects_records:
        return (
            f"of each row, by DP-SGD within the clients: gradients clipped to a norm of {norm}, noise of "
            f"{accountant.noise_multiplier:.3g} of that in their sum, Poisson sampling, δ = {accountant.delta:g}"
        )
    clipped = f"updates clipped to {f'a norm of {norm}' if isinstance(norm, float) else 'the median of their norms'}"
    drawn = {"poisson": "Poisson sampling", "fixed_size": "as many clients in every round"}[args.dp_sampling]
    noise = f"noise of {accountant.noise_multiplier:.3g} of that in their sum"
    return f"of each client, by DP-FedAvg: {clipped}, {noise}, {drawn}, δ = {accountant.delta:g}"


def _teaching(args: DevFTConfig) -> str | None:
    """Describe what makes submodels stand for the base."""
    bridged = ["bridged"] if args.fusion == "bridge" else []
    healed = [f"healed in {args.healing_steps} steps"] if args.healing_steps else []
    return f"{' and '.join([*bridged, *healed])} on the server's texts" if bridged or healed else None


def _adapter(config: PeftConfig) -> str:
    """Describe an adapter in a few words."""
    if not isinstance(config, LoraConfig):
        return config.peft_type.value
    kind = "DoRA" if config.use_dora else "LoRA"
    whole = f", with {', '.join(sorted(set(config.modules_to_save)))} trained whole" if config.modules_to_save else ""
    start = f", from {config.init_lora_weights}" if moves_weights(config) else ""
    return f"{kind} of rank {config.r}, alpha {config.lora_alpha}{start}{whole}"
