"""Every config, without its weights: a typo cannot wait for a GPU to be found."""

import functools
from pathlib import Path

import pytest
from transformers import AutoConfig

from hf_devft import DevFTConfig
from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import make_plan
from hf_devft.run.plan import RunPlan


RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted(RECIPES.glob("configs/*.yaml"))
MODELS = Path(__file__).parent / "model_configs"
SAME_MODEL = {"efficient": "gemma3-270m"}

NO_GPU = ["--output_dir", "unused", "--use_cpu", "true"]


@functools.cache
def planned(name: str) -> tuple[DevFTConfig, RunPlan]:
    saved = MODELS / SAME_MODEL.get(name, name)
    argv = [*NO_GPU, "--model_name_or_path", str(saved)] if saved.exists() else NO_GPU
    recipe, args = parse_arguments(argv, RECIPES / "configs" / f"{name}.yaml")
    return args, make_plan(recipe, args)


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_a_config_can_be_planned_on_the_meta_device(name):
    args, plan = planned(name)
    layers = [stage.num_layers for stage in plan.stages]
    assert layers == (args.stage_layers or layers) == sorted(layers)
    assert all(stage.flops > 0 and stage.client_memory > stage.base_bytes for stage in plan.stages)
    assert plan.total.bytes < plan.without_stages.bytes or len(layers) == 1


@pytest.mark.parametrize("name", ["llama2-7b", "llama3.1-8b", "llama2-13b"])
def test_the_plan_is_right_for_the_papers_set_ups(name):
    _, plan = planned(name)
    base = AutoConfig.from_pretrained(MODELS / name)
    hidden, intermediate, depth = base.hidden_size, base.intermediate_size, base.num_hidden_layers
    narrow = hidden * base.num_key_value_heads // base.num_attention_heads
    layer = 32 * (2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + intermediate))
    for stage in plan.stages:
        assert stage.trainable == stage.num_layers * layer
        assert stage.bytes_down == stage.bytes_up == 4 * stage.trainable
        assert stage.bytes == stage.rounds * 2 * 8 * stage.trainable
        assert stage.tokens == stage.rounds * 2 * 10 * 16 * 512
    assert plan.total.bytes == pytest.approx(plan.without_stages.bytes * 15 / 32)
    # Four bits and the scales of blocks of 64 values, but for embeddings, head and norms.
    matrices = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * intermediate
    rest = 2 * (2 * base.vocab_size * hidden + (2 * depth + 1) * hidden)
    assert plan.stages[-1].base_bytes == pytest.approx(depth * matrices * 0.5625 + rest)
    memories = [stage.client_memory for stage in plan.stages]
    assert memories == sorted(memories)
    assert memories[0] < 0.6 * memories[-1]


@pytest.mark.parametrize("data", [["--train_file", "a.csv", "b.csv"], []], ids=str)
def test_more_clients_a_round_than_there_are_cannot_be_planned(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.csv").write_text("prompt,completion\n" + "a,b\n" * 20)
    argv = [*NO_GPU, *data, "--clients_per_round", "30"]
    with pytest.raises(ValueError, match=f"clients_per_round=30, but there are {2 if data else 20} clients: lower it"):
        make_plan(*parse_arguments(argv))


def test_the_plan_counts_the_labels_of_a_file(tmp_path):
    values = []
    for labels in (2, 5):
        rows = "".join(f"text {row},{row % labels}\n" for row in range(20))
        (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
        argv = [*NO_GPU, "--model_name_or_path", str(MODELS / "roberta-classification"), "--train_file",
                str(tmp_path / "rows.csv"), "--num_clients", "4"]  # fmt: skip
        config = RECIPES / "configs" / "roberta-classification.yaml"
        values.append(make_plan(*parse_arguments(argv, config)).total.trainable)
    assert values[1] - values[0] == 3 * (768 + 1)


@pytest.mark.parametrize("path", sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_saved_model_configs_are_of_the_configs_models(path):
    recipe, args = parse_arguments(NO_GPU, RECIPES / "configs" / f"{path.name}.yaml")
    config = AutoConfig.from_pretrained(path)
    depth = config.num_hidden_layers + (config.decoder_layers if config.is_encoder_decoder else 0)
    assert args.stage_layers[-1] == depth
    assert "/" in recipe.model_name_or_path


def test_the_papers_set_up():
    """§4.1: LoRA r 32, α 64; 20 clients, 2 a round, 10 steps of 16; length 512; β 0.15 for 13B, else 0.1."""
    for name, layers in {
        "llama2-7b": [4, 8, 16, 32], "llama3.1-8b": [4, 8, 16, 32], "llama2-13b": [5, 10, 20, 40],
    }.items():  # fmt: skip
        recipe, args = parse_arguments(NO_GPU, RECIPES / "configs" / f"{name}.yaml")
        assert args.stage_layers == layers
        assert (recipe.lora_r, recipe.lora_alpha) == (32, 64)
        assert (args.num_clients, args.clients_per_round, args.local_steps, args.max_length) == (20, 2, 10, 512)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
        assert (args.grouping, args.fusion, args.fusion_beta, args.transfer) == (
            "deconfliction", "differential", 0.15 if "13b" in name else 0.1, "broadcast",
        )  # fmt: skip
        assert args.model_init_kwargs["quantization_config"]["load_in_4bit"]
