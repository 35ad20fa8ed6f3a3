"""What a trainer class or a callback of one's own overrides, and whether rounds ever call it."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback


logger = logging.getLogger(__name__)

_LIBRARIES = ("hf_devft", "transformers", "trl")
# Methods of `Trainer` that rounds do not call -> what to do instead.
_NEVER_CALLED = {
    "create_optimizer_and_scheduler": "override `create_optimizer` or `create_scheduler`",
    "get_train_dataloader": "pass a `data_collator`, or set the `dataloader_*` options",
    "_get_train_sampler": "set `train_sampling_strategy`",
    "_save": "write what you need in a callback's `on_save`",
}
# The same of a trainer that `DevFTMixin` is put before, whose place the mixin's own take.
_REPLACED = dict.fromkeys(("save_model", "_save_checkpoint"), _NEVER_CALLED["_save"])
# Events of callbacks within a client's training, of which there are many at a time.
_SILENT_EVENTS = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end")


def is_overridden(trainer: Trainer, name: str) -> bool:
    """Whether a trainer has a method of its own in the place of `Trainer`'s."""
    hook = getattr(trainer, name)
    return getattr(hook, "__func__", hook) is not getattr(Trainer, name)


def check_overrides(trainer: Any) -> None:
    """Refuse a trainer class whose own methods would never be called.

    Raises:
        ValueError: says which, and what to do instead.
    """
    classes = type(trainer).__mro__
    ours = max(place for place, each in enumerate(classes) if _is_of(each, ("hf_devft",)))
    _refuse(classes, _NEVER_CALLED)
    _refuse(classes[ours:], _REPLACED)


def _refuse(classes: Sequence[type], instead: dict[str, str]) -> None:
    for each in classes:
        for name in instead.keys() & vars(each).keys() if not _is_of(each, _LIBRARIES) else ():
            raise ValueError(f"{each.__name__}.{name} is never called by federated rounds: {instead[name]}.")


def _is_of(each: type, libraries: Iterable[str]) -> bool:
    return each.__module__.partition(".")[0] in libraries


def warn_of_silent_events(callbacks: Iterable[TrainerCallback]) -> None:
    """Say which events, that callbacks of one's own wait for, never come."""
    for callback in callbacks:
        kind = type(callback)
        if _is_of(kind, _LIBRARIES):
            continue
        if silent := [name for name in _SILENT_EVENTS if getattr(kind, name) is not getattr(TrainerCallback, name)]:
            logger.warning(
                f"{kind.__name__}.{', '.join(silent)} is never called: a step is a round here, in which clients take "
                "steps of their own. Override the trainer's `training_step` or `create_optimizer` to see these."
            )
