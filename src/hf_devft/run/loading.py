"""Load what a run has left: a stage's compact submodel, from a folder or the Hub; and see whether it fits."""

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from hf_devft.configuration import StageConfig
from hf_devft.configuration.stage_folder import SUBMODEL
from hf_devft.embedded import resolve_model_name
from hf_devft.files import naming
from hf_devft.hub.download import fetch_adapter
from hf_devft.models.adapter import attach_adapter, own_adapted_weights
from hf_devft.models.adapter_files import load_adapter
from hf_devft.models.base_difference import BaseDifference, base_difference
from hf_devft.models.layer_files import healed_path, read_healed
from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.streaming import load_base
from hf_devft.stages.fusion import FUSIONS
from hf_devft.stages.submodel import build_submodel, layers_of, reloads_alike
from hf_devft.stages.teaching.healing import load_taught_state
from hf_devft.tasks import TASKS


logger = logging.getLogger(__name__)


def load_submodel(
    base: str | PreTrainedModel,
    name_or_path: str | Path,
    stage: int,
    revision: str | None = None,
    token: str | None = None,
) -> PeftModel:
    """Load the submodel that a stage trained, with the adapter it trained, for devices that run only the small one.

    `.merge_and_unload()` makes it a plain transformers model, whose `save_pretrained` needs no code of ours to load;
    not where it has bridges, and a warning says where the architecture would make another model of it.

    Args:
        base: the run's base, by name (then only the layers of the submodel's groups are read, of the revision that
            was trained on), or as a model, which is frozen and shares all weights but the adapted ones; give it in
            the dtype it was trained in.
        name_or_path: the run's `output_dir`, or its repository.
        stage: from 1.
        revision, token: of the repository.

    Raises:
        OSError: there is no such stage.
        ValueError: there is neither such a folder nor a readable repository; its record, its adapter or its healed
            layers are broken, or of another base.
    """
    there = sorted(path.name for path in Path(name_or_path).glob("stage-*/"))
    if there and f"stage-{stage}" not in there:
        raise OSError(f"{name_or_path} has no stage {stage}: give one of {', '.join(there)}, by its number.")
    folder = fetch_adapter(name_or_path, f"stage-{stage}/{SUBMODEL}", revision, token)
    config = StageConfig.from_pretrained(name_or_path, subfolder=f"stage-{stage}", revision=revision, token=token)
    if config.groups is None or config.fusion not in FUSIONS or config.task not in TASKS:
        raise ValueError(
            f"stage {stage} of {name_or_path} has groups {config.groups}, fusion {config.fusion!r} and task "
            f"{config.task!r}."
        )
    by_name = isinstance(base, str)
    if isinstance(base, str):
        base = _named_base(base, config)
    stack = find_layer_stack(base, config.stack)
    if len(stack) != config.full_layers:
        raise ValueError(
            f"the base has {len(stack)} layers, but stage {stage} of {name_or_path} was made from one of "
            f"{config.full_layers} ({config.base_model_name_or_path}): give that."
        )
    adapter = load_adapter(folder)
    submodel = build_submodel(base, stack, config.groups, config.fusion, config.fusion_beta)
    if not config.has_bridges and not reloads_alike(submodel):
        logger.warning(
            f"{type(submodel).__name__} makes more of a layer's number than its place: saved by `save_pretrained`, "
            "this submodel would be another model when it is loaded. Load it here."
        )
    with naming(folder):
        if config.is_taught:
            state = read_healed(healed_path(folder, stage))
            load_taught_state(layers_of(submodel, stack, config.groups), state, bridges_only=not config.healing_steps)
        model = attach_adapter(submodel, *adapter).requires_grad_(False).eval()
    own_adapted_weights(model, tied_only=by_name)
    return model


def _named_base(name: str, config: StageConfig) -> PreTrainedModel:
    """Load a stage's base, of the revision that was trained on where that has this name."""
    options: dict[str, Any] = {}
    if config.labels:  # the adapter has the head
        options = {"id2label": dict(enumerate(config.labels)), "ignore_mismatched_sizes": True}
    if name == config.base_model_name_or_path and config.base_model_revision and not Path(name).exists():
        options["revision"] = config.base_model_revision
    return load_base(resolve_model_name(name), TASKS[config.task].auto_class, config.stack, **options)


def compare_bases(old: str | PreTrainedModel, new: str | PreTrainedModel) -> BaseDifference:
    """Measure how far a base is from the one that an adapter was made on, before the adapter is put on it or trained
    on.

    An adapter is a change of weights: it is worth as much on another base as that has kept of the old one's. Bases
    given by name are read parameter by parameter.

    Raises:
        ValueError: their shapes differ, so that no adapter fits both.
    """
    old, new = (load_base(resolve_model_name(base)) if isinstance(base, str) else base for base in (old, new))
    return base_difference(old, new)
