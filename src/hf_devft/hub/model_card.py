"""A model card from a template, with the run's own numbers."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_devft.configuration import StageConfig
from hf_devft.embedded import EMBEDDED
from hf_devft.models.gguf import locate


TAG = "devft"  # of every card's metadata


@dataclass(frozen=True)
class CardContext:
    """What a card tells beside the stages' records.

    Attributes:
        model_name: title.
        source: folder or repository that holds all stages.
        plot: file name of the plot, in the card's folder.
        setup: {what: value} of the federation.
        table: (titles, rows) of the finished stages.
        evaluation: what the metrics were measured on.
        simulated: whether the clients were, in one job that had the data of all.
        imports, load: Python that loads the adapter; "LOCATION" in it stands for where it is.
        license, language, datasets: for the metadata, where the run says.
        protects_records: whether a run that is differentially private is so for rows, not for clients.
    """

    model_name: str
    source: str
    plot: str
    setup: dict[str, object]
    table: tuple[list[str], list[list[str]]]
    evaluation: str
    simulated: bool
    imports: str
    load: str
    license: str | None = None
    language: list[str] | None = None
    datasets: list[str] | None = None
    protects_records: bool = False


_METRICS = {
    "eval_full_loss": ("loss", "loss"),
    "eval_full_exact_match": ("exact_match", "exact match"),
    "eval_full_accuracy": ("accuracy", "accuracy"),
    "eval_full_f1": ("f1", "macro F1"),
}


def model_card(stages: list[StageConfig], context: CardContext, location: str) -> ModelCard:
    """The card of the newest of the finished `stages`.

    Args:
        location: arguments of `from_pretrained` in the snippet.
    """
    stage = stages[-1]
    base = _on_hub(stage.base_model_name_or_path)
    results = [
        EvalResult(
            task_type=stage.task,
            dataset_type=(context.datasets or ["held-out"])[0],
            dataset_name=context.evaluation,
            metric_type=kind,
            metric_name=f"{name} at full depth",
            metric_value=stage.metrics[key],
        )
        for key, (kind, name) in _METRICS.items()
        if key in stage.metrics
    ]
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        license=context.license,
        language=context.language,
        datasets=context.datasets,
        library_name="peft",
        pipeline_tag=stage.task,
        tags=[TAG, "federated-learning", "lora"],
        model_name=context.model_name,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=files("hf_devft.hub").joinpath("model_card_template.md").read_text(),
        stage=stage,
        context=context,
        load=context.load.replace("LOCATION", location),
        sizes=[len(group) for group in stage.groups or []],
    )


def _on_hub(base: str | None) -> str | None:
    """The repository of a base on the Hub, also of a GGUF file in it; None for the embedded base and local paths."""
    if base is None or base == EMBEDDED or Path(base).exists():
        return None
    return locate(base, {})[0]
