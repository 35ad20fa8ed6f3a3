"""Losses without a layer: those of the models that one would build for it, each measured once."""

import contextlib

import pytest
import torch
from architectures import tiny_model
from transformers import T5Config, T5ForConditionalGeneration, set_seed
from transformers.loss.loss_utils import ForCausalLMLoss as model_loss

from hf_devft.models.counted_logits import count_logits
from hf_devft.models.layer_stack import with_layers
from hf_devft.stages.builder import SubmodelBuilder
from hf_devft.trainer.calibration import CalibrationLoss
from hf_devft.trainer.session import server_rows


def tiny_t5():
    set_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)).eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    for length in (7, 9):
        ids = torch.randint(5, 60, (2, length), generator=generator)
        yield {"input_ids": ids, "labels": torch.where(torch.arange(length) < 3, -100, ids)}


def calibration(measured: list, prepare=count_logits) -> CalibrationLoss:
    def loss(model, inputs):
        measured.append(model)
        return model(**inputs).loss

    return CalibrationLoss(batches, loss, prepare, contextlib.nullcontext, torch.device("cpu"), 0, 1, 0)


@pytest.mark.parametrize(
    ("make", "stack"), [(lambda: tiny_model("gemma2"), None), (tiny_t5, "decoder")], ids=["one-stack", "two-stacks"]
)
def test_losses_are_those_of_the_models_without_a_layer(make, stack):
    base = make()
    builder = SubmodelBuilder(base, stack, None)
    layers, measured = list(range(len(builder.stack))), []
    losses_without = calibration(measured).of(builder)
    losses = losses_without(layers, layers[1:])
    for candidate, loss in zip(layers[1:], losses, strict=True):
        model = with_layers(base, builder.stack, [layer for layer in layers if layer != candidate]).eval()
        with torch.no_grad():
            expected = torch.stack([model(**inputs).loss for inputs in batches()]).mean().item()
        assert loss == pytest.approx(expected, rel=1e-5)
    before = len(measured)
    assert losses_without(layers, layers[1:]) == losses
    assert len(measured) == before, "each is measured once"


def test_losses_do_not_depend_on_what_was_drawn_before():
    """A collator may draw, and a run that goes on has drawn less."""
    base, found = tiny_model("gemma2"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        builder, losses = SubmodelBuilder(base, None, None), calibration([])
        losses._batches = lambda: [{"input_ids": (ids := torch.randint(5, 60, (2, 7))), "labels": ids}]
        found.append(losses.of(builder)([0, 1, 2], [1, 2]))
    assert found[0] == found[1]


def test_a_loss_of_ones_own_is_told_how_many_labels_there_are(make_trainer, eval_tasks):
    counts = []

    def loss(outputs, labels, num_items_in_batch):
        counts.append(int(num_items_in_batch))
        return model_loss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch=num_items_in_batch)

    make_trainer(grouping="calibrated", eval_dataset=eval_tasks, compute_loss_func=loss, stage_rounds=[1]).train()
    assert all(counts)


def test_all_evaluation_sets_are_asked(make_trainer, eval_tasks):
    sets = {"a": eval_tasks.select(range(6)), "b": eval_tasks.select(range(6, 8))}
    trainer = make_trainer(grouping="calibrated", eval_dataset=sets, calibration_samples=6)
    rows, own = server_rows(trainer), trainer.eval_dataset
    assert rows["input_ids"][:] == [*own["a"]["input_ids"][:3], *own["b"]["input_ids"][:]]
    assert len(server_rows(make_trainer(grouping="calibrated", eval_dataset=eval_tasks, calibration_samples=6))) == 6


def test_layers_below_are_computed_once():
    """Without the last of six layers one is computed, without the first but one four: 6 + 4 + 3 + 2 + 1 + 1."""
    base, computed = tiny_model("llama"), []
    builder = SubmodelBuilder(base, None, None)

    def watch(model):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: computed.append(1))

    calibration([], watch).of(builder)(list(range(6)), list(range(1, 6)))
    assert len(computed) == 2 * (6 + 4 + 3 + 2 + 1 + 1)
