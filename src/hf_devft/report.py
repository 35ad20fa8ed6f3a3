"""What a finished stage leaves behind: its folder, card, plot and table."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedTokenizerBase

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.federation.ledger import Ledger
from hf_devft.federation.partition import ClientData
from hf_devft.hub.artifacts import PLOT, save_stage
from hf_devft.hub.model_card import CardContext, model_card
from hf_devft.layout import State
from hf_devft.plotting import plot_run
from hf_devft.progress import stage_rows
from hf_devft.stages.principal import moves_weights
from hf_devft.tasks import TASKS


@dataclass
class RunReport:
    """What the artifacts of all stages have in common."""

    output_dir: str
    tokenizer: PreTrainedTokenizerBase | None
    base_name: str | None
    base_revision: str | None
    setup: dict[str, Any]
    evaluation_rows: int
    labels: list[str] | None = None
    repo_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def write(
        self,
        stages: list[StageConfig],
        full: tuple[LoraConfig, State],
        sub: tuple[LoraConfig, State],
        log_history: list[dict],
        ledger: Ledger,
        save_state: Callable[[Path], None],
    ) -> None:
        """Write the newest of the finished `stages`: `stage-N/`, and the root anew.

        Args:
            full, sub: its full-depth and compact adapter.
            save_state: writes what a run needs to go on with the next stage, ledger included.
        """
        stage = stages[-1]
        imports, load = TASKS[stage.task].snippet(self.base_name, self.labels)
        stage.base_model_name_or_path, stage.base_model_revision = self.base_name, self.base_revision
        stage.labels = self.labels
        figure = plot_run(log_history, ledger, stages)
        context = CardContext(
            model_name=Path(self.output_dir).name,
            source=self.repo_id or self.output_dir,
            plot=PLOT,
            setup=self.setup,
            table=stage_rows(with_start(stages, log_history)),
            evaluation=f"{self.evaluation_rows} held-out rows" if self.evaluation_rows else "no data",
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
            model_card(stages, context, where).save(folder / "README.md")

        save_stage(self.output_dir, stage, full, sub, self.tokenizer, write_extras, write_card)


def with_start(stages: list[StageConfig], log_history: list[dict]) -> list[StageConfig]:
    """The stages, after a stage 0 that stands for the start where that was evaluated."""
    start = [row for row in log_history if row.get("stage") == 0]
    none = {"stage": 0, "num_layers": stages[-1].full_layers, "rounds_done": 0, "totals": Ledger().totals()}
    return [replace(stages[-1], metrics=row, **none) for row in start[:1]] + stages


def describe_setup(args: DevFTConfig, clients: ClientData, peft_config: LoraConfig) -> dict[str, Any]:
    """The federation's set-up, as a card shows it."""
    sizes = [len(rows) for rows in clients.rows.values()]
    options = ", ".join(f"{name} {value}" for name, value in (args.federated_method_kwargs or {}).items())
    special = {
        "what travels": None if args.wire_dtype == "fp32" and args.wire_top_k == 1 else
        f"{args.wire_dtype}, {args.wire_top_k:.0%} of a client's changes",
        "submodels": f"healed in {args.healing_steps} steps on the server's texts" if args.healing_steps else None,
        "where layers come back": f"{args.distillation_steps} steps of distillation on the server's texts"
        if args.distillation_steps else None,
        "participants": None if args.client_selection == "uniform" else args.client_selection,
    }  # fmt: skip
    return {
        "federated method": args.federated_method + (f" ({options})" if options else ""),
        "clients": len(sizes),
        "clients per round": args.clients_per_round,
        "partition": args.partition,
        "examples per client": f"{min(sizes)} to {max(sizes)}",
        "local steps": args.local_steps,
        "batch size": args.train_batch_size * args.gradient_accumulation_steps,
        "adapter": _adapter(peft_config),
        "seed": args.seed,
    } | {name: value for name, value in special.items() if value is not None}


def _adapter(config: PeftConfig) -> str:
    """In a few words."""
    if not isinstance(config, LoraConfig):
        return config.peft_type.value
    kind = "DoRA" if config.use_dora else "LoRA"
    whole = f", with {', '.join(sorted(set(config.modules_to_save)))} trained whole" if config.modules_to_save else ""
    start = f", from {config.init_lora_weights}" if moves_weights(config) else ""
    return f"{kind} of rank {config.r}, alpha {config.lora_alpha}{start}{whole}"
