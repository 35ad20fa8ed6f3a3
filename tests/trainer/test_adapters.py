"""The adapters that users know from PEFT, through stages and back."""

import math

import pytest
import torch
from conftest import ANCHORS, CopyAtSaves, lora, tiny_llama
from peft import IA3Config, LoHaConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_devft import load_submodel
from hf_devft.models.adapter import adapter_state
from hf_devft.models.supported import check_adapter


TOKENS = torch.tensor([[5, 6, 7, 8]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


ADAPTERS = {
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "patterns": lambda: lora(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 2}),
    "some layers": lambda: lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2, 3]),
    "regex": lambda: lora(target_modules=r".*\.self_attn\.[qv]_proj"),
    "embeddings and head": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
                             feedforward_modules=["down_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_stage_loads_with_plain_peft(make_trainer, name):
    trainer = make_trainer(peft_config=ADAPTERS[name](), model=untied())
    trainer.train()
    folder = trainer.args.output_dir
    trained = logits(trainer.model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(untied(), folder)), trained)
    assert not torch.allclose(logits(untied()), trained)
    assert logits(load_submodel(untied(), folder, stage=1)).isfinite().all()


@pytest.mark.parametrize("head", ["lm_head", "embed_tokens"])
def test_a_module_is_trained_whole_in_float32_beside_a_base_in_half_precision(make_trainer, eval_tasks, head):
    """As LoRA is; plain PEFT leaves it in the base's precision."""
    adapter = lora(target_modules=["q_proj"], modules_to_save=[head])
    trainer = make_trainer(peft_config=adapter, model=untied().to(torch.bfloat16), eval_dataset=eval_tasks)
    key = next(key for key in trainer.run.adapter.state if head in key)
    before = trainer.run.adapter.state[key].clone()
    trainer.train()
    assert trainer.run.adapter.state[key].dtype == torch.float32
    assert not torch.equal(trainer.run.adapter.state[key], before.float())
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    loaded = PeftModel.from_pretrained(untied().to(torch.bfloat16), trainer.args.output_dir)
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0.1, atol=0.01)


def untied():
    model = tiny_llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    return model


def test_the_submodel_that_is_loaded_is_the_one_that_was_trained(make_trainer):
    """Also with an adapter on some layers only, which have other numbers there."""
    seen = {}

    def keep(model, stage):
        seen.setdefault(stage, logits(model))

    trainer = make_trainer(
        peft_config=ADAPTERS["some layers"](),
        model=untied(),
        callbacks=[before_the_stage_ends(keep)],
        stage_layers=[2, 4],
    )
    trainer.train()
    assert trainer.stages[0].groups[0] == [0], "the layer without adapter shares its group with none that has one"
    torch.testing.assert_close(logits(load_submodel(untied(), trainer.args.output_dir, stage=1)), seen[1])


def before_the_stage_ends(function):
    """A callback that calls `function` with the submodel, and the number of its stage."""

    class Watching(TrainerCallback):
        def on_epoch_end(self, args, state, control, model, **kwargs):
            function(model, math.ceil(state.epoch))

    return Watching()


def test_dora_members_keep_norms_of_their_own(make_trainer):
    trainer = make_trainer(peft_config=lora(use_dora=True), stage_layers=[1, 4])
    before = dict(trainer.run.adapter.state)
    trainer.run.stages = trainer.stages[:1]
    trainer.train()
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_magnitude_vector"
    changes = [trainer.run.adapter.state[key.format(layer)] / before[key.format(layer)] for layer in range(4)]
    assert (changes[0] != 1).any()
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0])
    assert not torch.equal(trainer.run.adapter.state[key.format(1)], trainer.run.adapter.state[key.format(0)])


@pytest.mark.parametrize("transfer", ["broadcast", "split"])
@pytest.mark.parametrize("options", [{"wire_dtype": "int4"}, {"federated_method": "fedit+scaffold"}], ids=str)
def test_what_is_remembered_of_doras_norms_outlives_a_stage(make_trainer, options, transfer):
    rounds = {"stage_layers": [2, 4], "clients_per_round": 4, "num_clients": 4, "transfer": transfer}
    trainer = make_trainer(peft_config=lora(use_dora=True), **rounds, **options)
    trainer.train()
    remembered = {key: value for key, value in trainer.run.federation.state_dict().items() if "magnitude" in key}
    assert remembered
    assert all(value.isfinite().all() for value in remembered.values())
    assert all(len(row.clients) == 4 for row in trainer.ledger.rounds)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_an_initialisation_takes_out_of_the_base_is_in_what_is_saved(make_trainer, tmp_path, init):
    seen = {}

    def keep(model, stage):
        seen.setdefault(stage, logits(model))

    def start(name, model):
        return make_trainer(
            peft_config=lora(init_lora_weights=init, use_rslora=True),
            model=model,
            callbacks=[before_the_stage_ends(keep)],
            output_dir=str(tmp_path / name),
            **ANCHORS,
        )

    base = untied()
    trainer = start("run", base)
    torch.testing.assert_close(logits(trainer.model), logits(untied()))
    with trainer.model.disable_adapter():
        assert not torch.allclose(logits(trainer.model), logits(untied()), atol=0.1)
    trainer.train()
    folder, trained = trainer.args.output_dir, logits(trainer.model)
    assert (trained - logits(untied())).abs().max() > 1e-3
    torch.testing.assert_close(logits(PeftModel.from_pretrained(untied(), folder)), trained)
    torch.testing.assert_close(logits(load_submodel(untied(), folder, stage=1)), seen[1])
    trainer.model.save_pretrained(tmp_path / "by PEFT")
    if "niter" not in init:  # of which PEFT draws another when it loads
        torch.testing.assert_close(logits(PeftModel.from_pretrained(untied(), tmp_path / "by PEFT")), trained)

    again = start("again", base)  # which is as it was
    again.train(resume_from_checkpoint=f"{folder}/stage-1")
    torch.testing.assert_close(logits(again.model), trained)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(untied(), again.args.output_dir)), trained)
    other = make_trainer(peft_config=lora(use_rslora=True), model=base, output_dir=folder, **ANCHORS)
    torch.testing.assert_close(logits(other.model), logits(untied()))
    with pytest.raises(ValueError, match="init_lora_weights"):
        other.train(resume_from_checkpoint=f"{folder}/stage-1")


def test_a_tied_head_is_taken_from_without_the_embeddings(make_trainer):
    adapter = lora(init_lora_weights="pissa", target_modules=["q_proj", "lm_head"])
    trainer = make_trainer(peft_config=adapter, model=tiny_llama(), **ANCHORS)
    torch.testing.assert_close(logits(trainer.model), logits(tiny_llama()))
    trainer.train()
    loaded = PeftModel.from_pretrained(tiny_llama(), trainer.args.output_dir)
    torch.testing.assert_close(logits(loaded), logits(trainer.model))


@pytest.mark.parametrize(("adapter", "message"), [
    (lora(init_lora_weights="pissa", r=12), "12 components out of a matrix"),
    (lora(init_lora_weights="pissa", target_modules=["q_proj", "embed_tokens"]), "leave it out"),
])  # fmt: skip
def test_modules_without_such_components_are_named(make_trainer, adapter, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=adapter, **ANCHORS)


def test_olora_knows_no_transposed_weights(make_trainer):
    config = GPT2Config(vocab_size=2048, n_embd=16, n_layer=4, n_head=2, n_positions=64)
    with pytest.raises(ValueError, match="transposed"):
        make_trainer(model=GPT2LMHeadModel(config), peft_config=lora(init_lora_weights="olora"), **ANCHORS)
    model = GPT2LMHeadModel(config)
    before = logits(model)
    trainer = make_trainer(model=model, peft_config=lora(init_lora_weights="pissa"), **ANCHORS)
    torch.testing.assert_close(logits(trainer.model), before)


def test_an_adapter_on_weights_that_were_changed_elsewhere_is_refused(make_trainer):
    model = get_peft_model(untied(), lora(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="pass the plain base"):
        make_trainer(model=model, peft_config=None, **ANCHORS)


@pytest.mark.parametrize(("adapter", "options", "message"), [
    (lora(use_dora=True), {"fusion": "mean"}, "norms of a layer's own weights"),
    (lora(use_dora=True), {"federated_method": "flora"}, "use_dora"),
    (lora(rank_pattern={"q_proj": 4}), {"federated_method": "hetlora"}, "rank_pattern"),
    (lora(rank_pattern={"layers.0.q_proj": 4}), {}, "names single layers"),
    (lora(init_lora_weights="eva"), {}, "look at data"),
    (lora(init_lora_weights="pisa"), {}, "'pisa'. is not supported"),
    (lora(init_lora_weights="pissa"), {}, "holds a part of its own layer"),
    (lora(init_lora_weights="olora"), ANCHORS | {"grouping": "calibrated"}, "every module"),
    (lora(init_lora_weights="pissa", alpha_pattern={"q_proj": 3}), ANCHORS, "cannot go with alpha_pattern"),
    (lora(init_lora_weights="pissa"), ANCHORS | {"federated_method": "flexlora"}, "products hold a part"),
    (lora(target_modules=r".*layers\.[01]\..*q_proj"), {}, "not on all layers alike"),
    (lora(modules_to_save=["input_layernorm"]), {}, "belongs to a single layer"),
    (lora(trainable_token_indices=[1]), {}, "trainable_token_indices"),
    (lora(ensure_weight_tying=True, modules_to_save=["embed_tokens"]), {}, "ensure_weight_tying"),
    (lora(target_modules=["q_proj"], bias="none", lora_bias=True), {}, "lora_bias"),
    (lora(rank_pattern={r"(.*\.)?q_proj": 4}), {}, "a pattern that may take forever"),
    (lora(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 1, "v_proj": 1}), {}, "that no module has"),
    (lora(lora_alpha=0), {}, "lora_alpha or an alpha_pattern is 0"),
    (LoHaConfig(target_modules=["q_proj"]), {}, "LoHaConfig is not supported"),
    (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
     {"federated_method": "ffa_lora"}, "IA3: use a `LoraConfig`"),
])  # fmt: skip
def test_what_stages_cannot_carry_is_refused_at_once(make_trainer, adapter, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(peft_config=adapter, **options)


def test_an_adapter_that_is_merged_is_not_trained_on_top_of_itself(make_trainer):
    model = get_peft_model(tiny_llama(), lora())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call `model.unmerge_adapter\(\)`"):
        make_trainer(model=model, peft_config=None)
    model.unmerge_adapter()
    make_trainer(model=model, peft_config=None)


def test_names_of_modules_may_have_numbers():
    check_adapter(lora(rank_pattern={"fc1": 4, "w2": 1}, target_modules=["fc1", "w2"]), new=True)


def test_ranks_above_the_others_outlive_the_end_of_a_stage_and_a_stop(make_trainer, tmp_path, eval_tasks):
    """They are not cut to the others' rank, as those that a residual was added to."""
    options = {
        "peft_config": lora(rank_pattern={"q_proj": 4}), "eval_dataset": eval_tasks, "save_strategy": "steps",
        "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
    }  # fmt: skip
    whole = make_trainer(output_dir=tmp_path / "whole", callbacks=[CopyAtSaves()], **options)
    whole.train()
    resumed = make_trainer(output_dir=tmp_path / "whole-at-1", **options)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(adapter_state(resumed.model), adapter_state(whole.model), rtol=0, atol=0)


@pytest.mark.parametrize("method", [
    "fedit", "ffa_lora", "fedsa_lora", "rolora", "flora", "fedex_lora", "flexlora", "hetlora", "c2a", "dofit",
    "droppeft", "fedit+scaffold", "fedit+fedadam",
])  # fmt: skip
def test_a_head_that_is_trained_whole_is_averaged_by_every_method(make_trainer, method):
    adapter = lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    trainer = make_trainer(peft_config=adapter, model=untied(), federated_method=method, stage_rounds=[1])
    key = "base_model.model.lm_head.weight"
    before = trainer.run.adapter.state[key].clone()
    trainer.train()
    assert not torch.equal(trainer.run.adapter.state[key], before)
    loaded = PeftModel.from_pretrained(untied(), trainer.args.output_dir)
    torch.testing.assert_close(logits(loaded), logits(trainer.model))
