"""`StageConfig`: the record of one stage, and the stages of a run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Interval
from huggingface_hub import hf_hub_download
from pydantic import AllowInfNan
from transformers.utils import PushToHubMixin

from hf_devft.files import read_record, write_json
from hf_devft.models.layer_stack import STACKS


STAGE_CONFIG_NAME = "stage_config.json"

# No model has more layers, no run more stages or rounds: what follows from a number must not fill the memory.
_MOST = 100_000
Count = Annotated[int, Interval(ge=1, le=_MOST)]
Index = Annotated[int, Interval(ge=0, le=_MOST)]
Finite = Annotated[float, AllowInfNan(False)]
Positive = Annotated[float, Ge(0), AllowInfNan(False)]


@dataclass
class StageConfig(PushToHubMixin):
    """The record of one stage, saved beside its adapter as `stage_config.json`.

    Attributes:
        stage, num_stages: this stage (from 1) of how many.
        num_layers, full_layers: layers of the submodel (L_s) and of the base (L).
        rounds, learning_rate: communication rounds, and the learning rate before the schedule.
        grouping, fusion, fusion_beta, transfer, adapter_fusion, stack: the rules; see `DevFTConfig`.
        task: what the model is for; see `DevFTConfig`. labels: of its classes, in order.
        federated_method: how updates were combined.
        healing_steps: those that the submodel's layers were healed in. Where there are some, or bridges, the weights
            that the server has made are in `submodel/healed-N.safetensors`.
        adapted: the layers that have an adapter, where only some of the submodel's have one; None for all.
        groups: the layers of the base in each group, as they were found.
        base_model_name_or_path, base_model_revision: the base.
        rounds_done: rounds that ran; fewer than `rounds` where the stage ended early.
        metrics: evaluation of the round that the stage handed on: of the submodel (`eval_*`), where there was one
            then, and at full depth (`eval_full_*`).
        totals: the ledger's totals of this stage (bytes, tokens, FLOPs, seconds, peak memory), and beside them
            `setup_seconds` (grouping, calibration, fusion, bridges, healing, distillation), `setup_flops` (bridges,
            healing and distillation, on the server) and `base_bytes` (the submodel's base weights).
    """

    stage: Count
    num_stages: Count
    num_layers: Count
    full_layers: Count
    rounds: Count
    learning_rate: Positive
    grouping: str = "deconfliction"
    fusion: str = "anchor"
    fusion_beta: Finite = 0.1
    transfer: str = "broadcast"
    adapter_fusion: str = "anchor"
    stack: str | None = None
    task: str = "text-generation"
    labels: list[str] | None = None
    federated_method: str = "fedit"
    healing_steps: Annotated[int, Ge(0)] = 0
    adapted: list[Index] | None = None
    groups: list[list[Index]] | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    rounds_done: Index = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Finite] = field(default_factory=dict)

    @property
    def has_bridges(self) -> bool:
        """Whether bridges stand for some layers in its submodel."""
        return self.fusion == "bridge" and self.num_layers < self.full_layers

    @property
    def is_taught(self) -> bool:
        """Whether its submodel has weights that the server has made, and the base does not have."""
        return bool(self.healing_steps) or self.has_bridges

    @property
    def num_trained(self) -> int:
        """How many layers have an adapter that is trained, where all layers of the submodel can have one."""
        return self.num_layers if self.adapted is None else len(self.adapted)

    @property
    def adapter_rule(self) -> tuple[list[list[int]], str, float, list[int] | None]:
        """How its adapter is made of the full-depth one; see `GlobalAdapter.fuse`."""
        assert self.groups is not None
        return self.groups, self.adapter_fusion, self.fusion_beta, self.adapted

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write `stage_config.json` into a folder. What `push_to_hub` passes on for models is ignored."""
        write_json(Path(save_directory) / STAGE_CONFIG_NAME, asdict(self), indent=2)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "StageConfig":
        """Read `stage_config.json` from a folder or a Hub repository. Keys of newer versions are ignored.

        Raises:
            OSError: the file is not there.
            ValueError: it is not a stage's record.
        """
        if Path(name_or_path).is_dir():
            path = Path(name_or_path) / (subfolder or "") / STAGE_CONFIG_NAME
        else:
            path = Path(
                hf_hub_download(
                    str(name_or_path), STAGE_CONFIG_NAME, subfolder=subfolder, revision=revision, token=token
                )
            )
        config = read_record(path, cls)
        try:
            config.check()
        except ValueError as error:
            raise ValueError(f"{path} is not a stage's record: {error}") from error
        return config

    def check(self) -> None:
        """Refuse what no run writes, before anything is built from it.

        Raises:
            ValueError: values that do not agree with each other.
        """
        if self.stage > self.num_stages or self.num_layers > self.full_layers or self.rounds_done > self.rounds:
            raise ValueError(
                f"stage {self.stage} of {self.num_stages}, {self.num_layers} of {self.full_layers} layers, "
                f"{self.rounds_done} of {self.rounds} rounds"
            )
        if self.stack not in (None, *STACKS):
            raise ValueError(f"stack={self.stack!r} is not a stack of layers")
        measured = {key: value for key, value in self.metrics.items() if key.endswith(("_loss", "_exact_match"))}
        if wrong := [key for key, value in measured.items() if type(value) not in (int, float)]:
            raise ValueError(f"{wrong[0]}={measured[wrong[0]]!r} is no number")
        if self.adapted is not None and self.adapted != sorted({*self.adapted} & {*range(self.num_layers)}):
            raise ValueError(f"adapted={self.adapted} are no layers of {self.num_layers}")
        if self.groups is None:
            return
        ordered = sorted(sorted(group) for group in self.groups)
        if (
            sorted(layer for group in self.groups for layer in group) != list(range(self.full_layers))
            or self.groups != ordered
            or len(self.groups) != self.num_layers
            or not all(self.groups)
        ):
            raise ValueError(
                f"groups={str(self.groups)[:200]} are not {self.num_layers} groups of {self.full_layers} layers, each "
                "and all of them in order"
            )


def derive_layers(num_layers: int, first: int, growth: float) -> list[int]:
    """Derive the layers of each stage: from `first`, times `growth` (and 1 more at least) each time, to
    `num_layers`."""
    layers, size = [], float(min(first, num_layers))
    while round(size) < num_layers:
        layers.append(round(size))
        size = max(size * growth, size + 1)
    return [*layers, num_layers]


def plan_stages(
    layers: list[int],
    rounds: int | list[int],
    learning_rates: float | list[float],
    healing_steps: int,
    adapted: list[list[int] | None],
    **common: Any,
) -> list[StageConfig]:
    """Make the records of a run's stages.

    Args:
        layers: of each stage; of the last one the model's. rounds, learning_rates: one value, or one per stage.
        healing_steps: of all stages that have fewer layers than the model.
        adapted: the layers that have an adapter in each stage; None for all.
        common: what is the same in all stages.

    Raises:
        ValueError: see `DevFTConfig.resolve_stages`.
    """
    rounds = _one_per_stage("stage_rounds", rounds, len(layers))
    rates = _one_per_stage("stage_learning_rates", learning_rates, len(layers))
    if not all(1 <= each <= _MOST for each in rounds):
        raise ValueError(f"stage_rounds={rounds}: give each stage 1 round or more, {_MOST} at most.")
    if min(rates) <= 0:
        raise ValueError(f"stage_learning_rates={rates}: give each stage a rate above 0.")
    return [
        StageConfig(
            stage=index + 1,
            num_stages=len(layers),
            num_layers=layers[index],
            full_layers=layers[-1],
            rounds=rounds[index],
            learning_rate=rates[index],
            healing_steps=healing_steps if layers[index] < layers[-1] else 0,
            adapted=adapted[index],
            **common,
        )
        for index in range(len(layers))
    ]


def adapted_layers(counts: list[int], end: str) -> list[list[int] | None]:
    """List the layers that have an adapter in each stage.

    Args:
        counts: how many in each stage; in the last one all. end: "first" or "last".
    """
    depth = counts[-1]
    layers = {"first": lambda count: range(count), "last": lambda count: range(depth - count, depth)}[end]
    return [None if count == depth else list(layers(count)) for count in counts]


def _one_per_stage(option: str, value: Any, count: int) -> list:
    """`value` as a list of one entry per stage."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, count):
        raise ValueError(
            f"{option}={values} has {len(values)} entries: give one for all, or one for each of {count} stages."
        )
    return values * count if len(values) == 1 else values
