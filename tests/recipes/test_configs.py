"""Every config, without its weights: a typo cannot wait for a GPU to be found."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoConfig

from hf_devft.arguments import parse_arguments


RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted(RECIPES.glob("configs/*.yaml"))
MODELS = Path(__file__).parent / "model_configs"

NO_GPU = ["--output_dir", "unused", "--use_cpu", "true"]

spec = importlib.util.spec_from_file_location("devft_recipe", RECIPES / "devft.py")
recipe_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe_script)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_can_be_planned_on_the_meta_device(path):
    saved = MODELS / path.stem
    argv = [*NO_GPU, "--model_name_or_path", str(saved)] if saved.exists() else NO_GPU
    recipe, args = parse_arguments(argv, path)
    plan = recipe_script.make_plan(recipe, args)
    layers = [stage.num_layers for stage in plan.stages]
    assert layers == args.stage_layers == sorted(layers)
    assert all(stage.flops > 0 and stage.client_memory > stage.base_bytes for stage in plan.stages)
    assert plan.total.bytes < plan.without_stages.bytes or len(layers) == 1


def test_the_plan_counts_the_labels_of_a_file(tmp_path):
    values = []
    for labels in (2, 5):
        rows = "".join(f"text {row},{row % labels}\n" for row in range(20))
        (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
        argv = [*NO_GPU, "--model_name_or_path", str(MODELS / "roberta-classification"), "--train_file",
                str(tmp_path / "rows.csv"), "--num_clients", "4"]  # fmt: skip
        config = RECIPES / "configs" / "roberta-classification.yaml"
        values.append(recipe_script.make_plan(*parse_arguments(argv, config)).total.trainable)
    assert values[1] - values[0] == 3 * (768 + 1)


@pytest.mark.parametrize("path", sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_saved_model_configs_are_of_the_configs_models(path):
    recipe, args = parse_arguments(
        ["--output_dir", "x", "--use_cpu", "true"], RECIPES / "configs" / f"{path.name}.yaml"
    )
    config = AutoConfig.from_pretrained(path)
    depth = config.num_hidden_layers + (config.decoder_layers if config.is_encoder_decoder else 0)
    assert args.stage_layers[-1] == depth
    assert "/" in recipe.model_name_or_path


def test_the_papers_set_up():
    """§4.1: LoRA r 32, α 64; 20 clients, 2 a round, 10 steps of 16; length 512; β 0.1."""
    for name, layers in {
        "llama2-7b": [4, 8, 16, 32], "llama3.1-8b": [4, 8, 16, 32], "llama2-13b": [5, 10, 20, 40],
    }.items():  # fmt: skip
        recipe, args = parse_arguments(
            ["--output_dir", "x", "--use_cpu", "true"], RECIPES / "configs" / f"{name}.yaml"
        )
        assert args.stage_layers == layers
        assert (recipe.lora_r, recipe.lora_alpha) == (32, 64)
        assert (args.num_clients, args.clients_per_round, args.local_steps, args.max_length) == (20, 2, 10, 512)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
        assert (args.grouping, args.fusion, args.fusion_beta, args.transfer) == (
            "deconfliction", "differential", 0.1, "broadcast",
        )  # fmt: skip
        assert args.model_init_kwargs["quantization_config"]["load_in_4bit"]
