import gc
import weakref

import torch
from transformers import TrainerCallback

from hf_devft.models.engines import Engine
from hf_devft.stages.builder import SubmodelBuilder
from hf_devft.trainer.model_in_use import ModelInUse


def test_the_engines_vector_is_the_adapter(make_trainer):
    trainer = make_trainer()
    engine = Engine(trainer.accelerator, trainer.model, trainer.create_optimizer, 1e-2, skip_ddp=True)
    before = engine.read().clone()
    engine.begin_client(torch.zeros_like(before), learning_rate=0.5)
    assert all(not parameter.any() for parameter in engine.parameters)
    assert {group["lr"] for group in engine.optimizer.param_groups} == {0.5}
    state = engine.layout.state(before)
    assert torch.equal(engine.layout.flat(state), before)
    ids = torch.tensor([[1, 2, 3]])
    engine.write(before)
    engine.model(input_ids=ids, labels=ids).loss.backward()
    engine.optimizer.step()
    assert not torch.equal(engine.read(), before)


def test_a_stage_leaves_nothing_behind(make_trainer, monkeypatch):
    stages, use, build = [], ModelInUse.use, SubmodelBuilder.build

    def watched(self, engine):
        use(self, engine)
        stages.append((weakref.ref(engine.peft_model), weakref.ref(engine)))

    def watched_build(self, *args):
        gc.collect()
        assert not any(model() is not None for model, _ in stages), "the next submodel has the memory for itself"
        return build(self, *args)

    monkeypatch.setattr(ModelInUse, "use", watched)
    monkeypatch.setattr(SubmodelBuilder, "build", watched_build)

    class Alive(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            gc.collect()
            alive = [model() is not None or engine() is not None for model, engine in stages]
            assert sum(alive) == 1, "only what the running stage needs is held"

    trainer = make_trainer(stage_layers=[1, 2, 3, 4], stage_rounds=[1], callbacks=[Alive()])
    trainer.train()
    assert len(stages) == 5, "four stages, and the full model at the end"
