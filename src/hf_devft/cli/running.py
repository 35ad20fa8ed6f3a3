"""Running a trainer from a command line: an end between two rounds when asked to stop."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_devft.cli.errors import GO_ON
from hf_devft.cli.rank import rank
from hf_devft.federation.processes import add_up
from hf_devft.trainer.mixin import DevFTMixin


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_between_rounds(trainer: DevFTMixin) -> Iterator[None]:
    """Within this context, Ctrl-C and SIGTERM let the running round end, write its checkpoint, and end the run; at the
    second one the process is killed. Several processes end after the same round, whichever of them is told.

    Raises:
        KeyboardInterrupt: at that end.
    """
    stop = _StopAtCheckpoint()
    trainer.add_callback(stop)
    before = {number: signal.signal(number, stop.ask) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(stop)


class _StopAtCheckpoint(TrainerCallback):
    """Has the running round's checkpoint written, and stops, once it is asked to.

    Attributes:
        asked: by a signal to this process, at any time. agreed: by all processes, at the end of a round.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False

    def ask(self, *_: Any) -> None:
        """Handle a signal; the next one kills, as an exception would be lost where it falls into a finaliser. What is
        half written then is under another name."""
        self.asked = True
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if rank() == 0:
            said = "stopping at the end of this round; once more to stop without its checkpoint"
            tqdm.write(said, file=sys.stderr)  # above the bar

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(float(self.asked), device=args.device)
        add_up(asked)
        self.agreed = bool(asked)
        if self.agreed:
            control.should_save, args.save_only_model = True, False  # to go on from

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            raise KeyboardInterrupt(f"stopped after round {state.global_step}: {GO_ON}.")
