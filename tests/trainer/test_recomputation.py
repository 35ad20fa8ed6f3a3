"""`auto_activation_checkpointing`: layers are computed again only in stages that would not fit into memory without."""

import pytest
from conftest import config
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_devft.configuration import Setup, check_compatibility
from hf_devft.run.peak_memory import USABLE
from hf_devft.trainer import recomputation
from hf_devft.trainer.recomputation import Recomputation


@pytest.fixture
def run(make_trainer, monkeypatch, tmp_path):
    """(bytes that are free, options) -> (trainer, what each stage was planned to take, whether it computes again)"""
    whole = Recomputation.planned_memory

    def run(room, watch=True, **options):
        planned, again = [], []

        class Look(TrainerCallback):
            def on_epoch_begin(self, args, state, control, model=None, **kwargs):
                again.append(model.get_base_model().is_activation_checkpointing)

        def watched(self, record, model):
            planned.append(whole(self, record, model))
            return planned[-1]

        monkeypatch.setattr(recomputation, "free_memory", lambda device: room / USABLE)
        if watch:
            monkeypatch.setattr(Recomputation, "planned_memory", watched)
        options = {"stage_layers": [1, 2, 4], "stage_rounds": [1], "auto_activation_checkpointing": True} | options
        trainer = make_trainer(callbacks=[Look()], output_dir=tmp_path / f"with {room}", **options)
        trainer.train()
        return trainer, planned, again

    return run


def test_only_stages_that_do_not_fit_compute_again_and_learn_the_same(run):
    ample, planned, again = run(1e12)
    assert again == [False, False, False]
    assert planned == sorted(planned)
    assert planned[0] < planned[1]
    short, _, again = run((planned[0] + planned[1]) / 2)
    assert again == [False, True, True]
    adapters = [load_file(f"{trainer.args.output_dir}/adapter_model.safetensors") for trainer in (ample, short)]
    assert all(adapters[0][name].equal(tensor) for name, tensor in adapters[1].items())


def test_clients_that_share_a_batch_take_as_much_more(run):
    (_, alone, _), (_, together, again) = run(1e12), run(0, clients_per_batch=2)
    assert all(more > less for more, less in zip(together, alone, strict=False))
    assert again == [True, True, True]


def test_it_is_not_planned_where_it_is_not_asked_for(run):
    _, planned, again = run(0, auto_activation_checkpointing=False)
    assert not planned
    assert again == [False, False, False]


def test_what_cannot_be_planned_computes_again(run, monkeypatch, caplog):
    def fails(self, record, model):
        raise RuntimeError("a value is asked for")

    monkeypatch.setattr(Recomputation, "planned_memory", fails)
    _, _, again = run(1e12, watch=False)
    assert again == [True, True, True]
    assert (
        "stage 1 cannot be planned (RuntimeError: a value is asked for): its layers are computed again" in caplog.text
    )


def test_smaller_submodels_of_clients_that_keep_them_decide_alike(make_trainer, monkeypatch):
    monkeypatch.setattr(recomputation, "free_memory", lambda device: 0)
    found = []

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            earlier = trainer.run.active.earlier.values()
            found.extend(each.engine.peft_model.get_base_model().is_activation_checkpointing for each in earlier)

    trainer = make_trainer(
        callbacks=[Look()], stage_layers=[2, 4], stage_rounds=[1], client_max_layers=[2, 4], clients_per_round=2,
        beyond_capacity="keep_last", auto_activation_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    assert found == [True]


def test_pairs_are_not_planned(tmp_path):
    args = config(tmp_path, auto_activation_checkpointing=True)
    with pytest.raises(ValueError, match="what pairs take is not planned: set activation_checkpointing"):
        check_compatibility(Setup(args, trainer="dpo"))
