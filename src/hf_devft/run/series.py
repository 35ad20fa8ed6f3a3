"""What trackers (TensorBoard, trackio, Weights & Biases) are told beside what is logged."""

from collections.abc import Callable, Mapping

from transformers import TrainerCallback


class SeriesCallback(TrainerCallback):
    """Gives each stage and each client a series of its own: `stage-2/eval_loss`, `client-north/loss`. The log history
    stays as it is.

    Args:
        client_losses: () -> the losses of the last round's clients, by name.
    """

    def __init__(self, client_losses: Callable[[], Mapping[str, float]]):
        self._client_losses = client_losses

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "stage" not in logs:
            return
        of_the_stage = {key: value for key, value in logs.items() if key == "loss" or key.startswith("eval_")}
        logs |= {f"stage-{logs['stage']}/{key}": value for key, value in of_the_stage.items()}
        if "loss" in of_the_stage:
            logs |= {f"client-{name}/loss": loss for name, loss in self._client_losses().items()}
