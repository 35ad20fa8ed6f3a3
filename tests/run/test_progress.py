"""The bar over all rounds."""

import re

import pytest
from transformers import PrinterCallback, ProgressCallback

from hf_devft.run.progress import RoundProgressCallback, show_rounds


def test_the_bar_shows_the_newest_numbers_of_the_stage_it_is_in(make_trainer, eval_tasks, capsys):
    make_trainer(
        eval_dataset=eval_tasks, eval_on_start=True, eval_strategy="steps", eval_steps=2, stage_rounds=[2, 3],
        disable_tqdm=False,
    ).train()  # fmt: skip
    shown = re.split(r"[\r\n]", capsys.readouterr().err)
    first = [line for line in shown if "stage 2/2" in line and "round 3/5" in line]
    assert first
    assert not any("eval" in line for line in first), "stage 1's"
    last = [line for line in shown if "round 5/5" in line][-1]
    assert re.search(r"loss \d\.\d{3}, eval \d\.\d{3}$", last.rstrip())


class OwnBar(ProgressCallback):
    """A user's."""


@pytest.mark.parametrize("off", [True, False])
def test_only_the_default_bar_is_replaced(make_trainer, off):
    trainer = make_trainer(callbacks=[OwnBar, PrinterCallback], disable_tqdm=off)
    kinds = [type(each) for each in trainer.callback_handler.callbacks]
    assert ProgressCallback not in kinds
    assert kinds.count(OwnBar) == 1
    assert kinds.count(PrinterCallback) == 1, "the user's"
    assert kinds.count(RoundProgressCallback) == (not off)
    trainer.remove_callback(RoundProgressCallback)
    show_rounds(trainer, [], dict)  # where there is none any more
