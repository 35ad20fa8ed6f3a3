"""The progress bar of a run: one bar over all rounds."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import has_length

from hf_devft.configuration import StageConfig
from hf_devft.run.series import SeriesCallback


# Fits 80 columns with two losses.
_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
_SHOWN = {"loss": "loss", "eval_loss": "eval", "epsilon": "ε"}


class RoundProgressCallback(TrainerCallback):
    """A bar over all rounds that names stage and round and shows the newest losses. Logs are not printed."""

    def __init__(self, stages: list[StageConfig]):
        self.stages = stages
        self.bar: tqdm | None = None
        self.prediction_bar: tqdm | None = None
        self.stage: StageConfig | None = None
        self.shown: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.stage, self.shown = None, {}
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=_FORMAT, desc="round"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            stage = self.stages[max(math.ceil(state.epoch), 1) - 1]
            if stage is not self.stage:
                self.stage = stage
                self.bar.set_description_str(
                    f"stage {stage.stage}/{stage.num_stages}, {stage.num_layers} layers: round", refresh=False
                )
                self.shown.clear()  # a loss on the layers of the last one says nothing of these
                self.bar.set_postfix_str("", refresh=False)
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs:
            self.shown |= {key: logs[key] for key in _SHOWN if key in logs}
            numbers = [f"{name} {self.shown[key]:.3f}" for key, name in _SHOWN.items() if key in self.shown]
            self.bar.set_postfix_str(", ".join(numbers))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(total=len(eval_dataloader), desc="evaluating", leave=False)
            self.prediction_bar.update(1)

    def _close_prediction_bar(self, *args, **kwargs):
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None

    on_evaluate = on_predict = _close_prediction_bar

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Leave the bars as they are, and go to the next line."""
        self._close_prediction_bar()
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@contextmanager
def leaving_bars(trainer: Trainer) -> Iterator[None]:
    """Close a trainer's bars at the end of this context, also where training breaks off, so that what is said then
    has a line of its own."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RoundProgressCallback):
                callback.close()


def show_rounds(trainer: Trainer, stages: list[StageConfig], client_losses: Callable[[], Mapping[str, float]]) -> None:
    """Put our bar in the place of the callback by which `Trainer` shows progress by default, or none with
    `disable_tqdm`; give trackers series of stages and clients.

    Args:
        client_losses: see `SeriesCallback`.
    """
    # Before those that read the logs.
    trainer.callback_handler.callbacks.insert(0, SeriesCallback(client_losses))
    default = PrinterCallback if trainer.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
    # Those before it are the user's; one may have taken it away.
    for callback in [each for each in trainer.callback_handler.callbacks if type(each) is default][-1:]:
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(RoundProgressCallback(stages))
