import json
import shutil

import pytest
import torch
from conftest import ANCHORS, lora, tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_devft import load_submodel
from hf_devft.models.adapter_files import load_adapter
from hf_devft.run import loading


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run(trained, make_trainer, eval_tasks):
    """A run's folder, and each stage's loss in its submodel."""
    if not (trained / "run").exists():
        trainer = make_trainer(
            output_dir=trained / "run", eval_dataset=eval_tasks, eval_strategy="epoch", fusion="differential"
        )
        trainer.train()
    return trained / "run"


def submodel_loss(model, eval_tasks, tokenizer, tmp_path, make_trainer) -> float:
    trainer = make_trainer(eval_dataset=eval_tasks, output_dir=tmp_path / "evaluate")
    trainer.model = trainer.model_wrapped = model
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("by_name", [False, True])
@torch.no_grad()
def test_the_submodel_is_the_one_that_was_trained(run, tmp_path, eval_tasks, tokenizer, make_trainer, by_name):
    base = tiny_llama()
    if by_name:
        base.save_pretrained(tmp_path / "base")
    model = load_submodel(str(tmp_path / "base") if by_name else base, run, stage=1).eval()
    assert model.config.num_hidden_layers == 2
    recorded = json.loads((run / "stage-1" / "stage_config.json").read_text())["metrics"]["eval_loss"]
    assert submodel_loss(model, eval_tasks, tokenizer, tmp_path, make_trainer) == pytest.approx(recorded, rel=1e-6)


@torch.no_grad()
def test_merged_it_is_a_plain_model(run, tmp_path):
    model = load_submodel(tiny_llama(), run, stage=1).eval()
    ids = torch.tensor([[3, 9, 27]])
    expected = model(input_ids=ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert plain.config.num_hidden_layers == 2
    torch.testing.assert_close(plain(input_ids=ids).logits, expected)


def test_merged_it_has_its_adapter_on_tied_embeddings_once(make_trainer, tmp_path):
    """By name, too, where nothing is shared with another model."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    folder = tmp_path / "tied"
    trainer = make_trainer(output_dir=folder, temporary_head=True, grouping="prefix", **ANCHORS)
    trainer.train()
    ids = torch.tensor([[3, 9, 27]])
    model = load_submodel(str(tmp_path / "base"), folder, stage=1).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, expected)


@torch.no_grad()
def test_merging_it_changes_no_other_model(run):
    base = tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for stage in (1, 2):
        load_submodel(base, run, stage=stage).merge_and_unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_base_by_name_is_of_the_revision_that_was_trained_on(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    record = tmp_path / "run" / "stage-1" / "stage_config.json"
    names = {"base_model_name_or_path": "me/base", "base_model_revision": "abc"}
    record.write_text(json.dumps(json.loads(record.read_text()) | names))
    (record.parent / "checksums.json").unlink()
    asked = {}
    monkeypatch.setattr(
        loading, "load_base", lambda name, *rest, **options: asked.update({name: options}) or tiny_llama()
    )
    for base in ("me/base", "me/other"):
        load_submodel(base, tmp_path / "run", stage=1)
    assert asked == {"me/base": {"revision": "abc"}, "me/other": {}}


def broken(run, tmp_path, name, change):
    """A copy of the run in which `change` was done to a file of stage 1."""
    shutil.copytree(run, tmp_path / "broken")
    path = tmp_path / "broken" / "stage-1" / name
    change(path)
    (path.parent / "checksums.json").unlink()  # whoever writes what they like leaves it out
    return tmp_path / "broken"


def edit(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def reshape(path):
    save_file({key: torch.zeros(3, 3) for key in load_file(path)}, path)


def rename(path):
    save_file({f"evil.{key}": tensor for key, tensor in load_file(path).items()}, path)


def pickle_instead(path):
    path.unlink()
    torch.save({"a": torch.zeros(1)}, path.with_name("adapter_model.bin"))


WEIGHTS, CONFIG = "submodel/adapter_model.safetensors", "submodel/adapter_config.json"


@pytest.mark.parametrize(("name", "change", "message"), [
    ("stage_config.json", edit(groups=[[0, 1], [1, 2, 3]]), "not a stage's record: groups"),
    ("stage_config.json", edit(groups=[[0, 1, 2], ["../3"]]), r"groups\.1\.0: Input should be a valid integer"),
    ("stage_config.json", edit(groups=[[3], [0, 1, 2]]), "not a stage's record: groups"),
    ("stage_config.json", edit(num_layers=10**9), "num_layers: Input should be less than or equal to 100000"),
    ("stage_config.json", edit(full_layers=7), "not a stage's record: groups"),
    ("stage_config.json", edit(full_layers="4"), "full_layers: Input should be a valid integer"),
    ("stage_config.json", edit(metrics={"eval_loss": "low"}), "not a stage's record: eval_loss='low' is no number"),
    ("stage_config.json", edit(fusion="__import__"), "fusion '__import__'"),
    ("stage_config.json", edit(groups=None), "has groups None"),
    ("stage_config.json", lambda path: path.write_text("{"), "no readable JSON"),
    (WEIGHTS, reshape, "its tensors have"),
    (WEIGHTS, rename, "differ in name or shape"),
    (WEIGHTS, lambda path: path.write_bytes(b"\x80\x04."), "no readable adapter"),
    (WEIGHTS, pickle_instead, "pickled weights are not read"),
    (CONFIG, edit(peft_type="IA3"), "no readable adapter"),
    (CONFIG, edit(r="many"), "r: Input should be a valid integer"),
    (CONFIG, edit(lora_alpha=float("nan")), "lora_alpha"),
    (CONFIG, edit(lora_alpha=-8), "give one above 0"),
    (CONFIG, edit(lora_alpha=1e308), "give one above 0, up to"),
    (CONFIG, edit(rank_pattern={r"(a+)+": 2}), "a pattern that may take forever"),
    (CONFIG, edit(alpha_pattern={r"(q|q)*_proj": 2.0}), "a pattern that may take forever"),
    (CONFIG, edit(alpha_pattern={"q_proj": "2"}), "give one above 0"),
    (CONFIG, edit(layers_to_transform=[0], layers_pattern=r"(.*)*x"), "a pattern that may take forever"),
    (CONFIG, edit(modules_to_save=["([a-z_.0-9]+)+!"]), "a pattern that may take forever"),
    (CONFIG, edit(target_modules=[f"x{i}" for i in range(100_000)]), "has 100000 entries, 4096 at most"),
    (CONFIG, edit(megatron_config={"x": 1}, megatron_core="this"), "sets megatron_config, megatron_core"),
    (CONFIG, edit(lora_dropout=7.0), "give 0 to below 1"),
    (CONFIG, edit(r=2_000_000), "its tensors have"),
    (CONFIG, lambda path: path.write_text("[]"), "no readable adapter"),
])  # fmt: skip
def test_what_is_broken_or_hostile_is_refused(run, tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        load_submodel(tiny_llama(), broken(run, tmp_path, name, change), stage=1)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_pattern_from_elsewhere_is_not_run(run, tmp_path, option):
    never_ends = edit(**{option: r"(([a-z0-9_]|\.)+)+!"})
    model = load_submodel(tiny_llama(), broken(run, tmp_path, CONFIG, never_ends), stage=1)
    assert "a-z" not in model.peft_config["default"].target_modules, "the tensors tell which modules it found"


def test_another_base_is_refused(run):
    with pytest.raises(ValueError, match="the base has 6 layers"):
        load_submodel(tiny_llama(6), run, stage=1)


def test_a_run_starts_from_an_adapter_by_its_name(run, make_trainer):
    trainer = make_trainer(peft_config=str(run))
    assert trainer.peft_config.r == 2
    expected = load_adapter(run)[1]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in trainer.run.adapter.state.items())
    assert any(parameter.requires_grad for parameter in trainer.model.parameters())
    with pytest.raises(ValueError, match="pass `peft_config`"):
        make_trainer(model=get_peft_model(tiny_llama(), lora()), peft_config=str(run))


def test_a_stage_that_is_not_there_names_those_that_are(run):
    with pytest.raises(OSError, match=r"has no stage 7: give one of stage-1, stage-2, by its number"):
        load_submodel(tiny_llama(), run, stage=7)
