"""What a user's own class, callback or model would lose without a sign."""

import pytest
import torch
from conftest import lora, tiny_llama
from peft import PeftModel, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from hf_devft import DevFTMixin, DevFTTrainer
from hf_devft.models.adapter import adapter_state


class OwnLoader(DevFTTrainer):
    def get_train_dataloader(self):
        raise AssertionError


class OwnOptimizers(DevFTTrainer):
    def create_optimizer_and_scheduler(self, num_training_steps):
        raise AssertionError


class OwnSampler(DevFTTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (OwnLoader, "OwnLoader.get_train_dataloader is never called.*`data_collator`"),
        (OwnOptimizers, "create_optimizer_and_scheduler is never called.*override `create_optimizer`"),
        (OwnSampler, "_get_train_sampler is never called.*`train_sampling_strategy`"),
    ],
)
def test_methods_that_rounds_never_call_are_refused(make_trainer, kind, says):
    with pytest.raises(ValueError, match=says):
        make_trainer(cls=kind)


def test_what_the_mixin_takes_the_place_of_is_refused(make_trainer):
    class Theirs(Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            raise AssertionError

    class Mixed(DevFTMixin, Theirs):
        def __init__(self, model, args, peft_config, **kwargs):
            super().__init__(get_peft_model(model, peft_config), args, **kwargs)

    with pytest.raises(ValueError, match=r"Theirs.save_model is never called.*`on_save`"):
        make_trainer(cls=Mixed)


def handed(self, num_training_steps, optimizer=None):
    self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def of_its_own(self, num_training_steps):
    self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)


@pytest.mark.parametrize("schedule", [handed, of_its_own])
def test_an_optimiser_and_a_schedule_may_only_be_set(make_trainer, schedule):
    """As `Trainer` allows, which does not look at what these methods return, nor hands over the optimiser."""

    class Setting(DevFTTrainer):
        create_scheduler = schedule

        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)

    trainer = make_trainer(cls=Setting)
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([rates[0], rates[0], rates[0] / 2, rates[0] / 2])


def test_events_that_never_come_are_said(make_trainer, caplog):
    class Watching(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            raise AssertionError

    make_trainer(callbacks=[Watching()]).train()
    assert "Watching.on_optimizer_step is never called" in caplog.text


# --- a model with an adapter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_model_that_was_passed_has_what_was_trained(make_trainer, tmp_path, name):
    given = get_peft_model(tiny_llama(), lora(), adapter_name=name)
    before = adapter_state(given)
    trainer = make_trainer(model=given)
    trainer.train()
    after = adapter_state(given)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(after[key], value) for key, value in adapter_state(trainer.model).items())
    ids = torch.arange(6)[None]
    torch.testing.assert_close(given.eval()(ids).logits, trainer.model.eval()(ids).logits)
    given.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" if name == "default" else tmp_path / "saved" / name
    again = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    torch.testing.assert_close(again(ids).logits, given(ids).logits)


def test_a_model_that_cannot_have_it_is_named(make_trainer, caplog):
    given = get_peft_model(tiny_llama(), lora())
    make_trainer(model=given, federated_method="flora").train()
    assert "the model that was passed is as it was: what was trained is `trainer.model`" in caplog.text


def test_parts_that_are_frozen_or_trained_beside_the_adapter_are_refused(make_trainer):
    thawed, frozen = (get_peft_model(tiny_llama(), lora()) for _ in range(2))
    for name, parameter in thawed.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameters of the base are to be trained, such as .*norm.*modules_to_save"):
        make_trainer(model=thawed)
    for name, parameter in frozen.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters of the adapter are frozen, such as .*lora_A.*ffa_lora"):
        make_trainer(model=frozen)


def test_a_model_over_several_devices_is_refused(make_trainer):
    model = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"spread over 2 devices .*: leave `device_map` out"):
        make_trainer(model=model)
