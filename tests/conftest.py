import gc
import os
import shutil
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need the network
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the tests' own Hub stores files by LFS

import datasets
import hypothesis
import pytest
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed
from transformers.utils import logging

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.embedded import BASE_PATH, task_dataset
from hf_devft.federation.privacy.secret import SECRET


# The same examples everywhere, and no deadline: the machines are slow and noisy.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
datasets.disable_progress_bars()
logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    """Whole runs first: on several processes, no long file is left for the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("trainer", "hub", "recipes", "tests"))


def freeze_what_is_imported():
    """It stays: garbage collections, of which every stage has some, need not look at it."""
    gc.collect()
    gc.freeze()


freeze_what_is_imported()


@pytest.fixture(scope="module", autouse=True)
def cheap_garbage_collections():
    freeze_what_is_imported()  # what the file before has imported, too


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_PATH)


@pytest.fixture(scope="session")
def tasks():
    return task_dataset(120, seed=0)


@pytest.fixture(scope="session")
def eval_tasks():
    return task_dataset(16, split="test", seed=0)


def write_secret(folder: str | Path, secret: int = 1) -> None:
    """Give private runs in a folder a secret that a test knows."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / SECRET).write_text(f"{secret}\n")


def tiny_llama(layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


class FirstIsBest(TrainerCallback):
    """Whatever was measured."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if "eval_runtime" in metrics:
            metrics["eval_runtime"] = 1.0 / (1 + state.global_step)


class CopyAtSaves(TrainerCallback):
    """Copies the output folder at each checkpoint, to `{output_dir}-at-{step}`: what a stop just then leaves."""

    def on_save(self, args, state, control, **kwargs):
        shutil.copytree(args.output_dir, f"{args.output_dir}-at-{state.global_step}")


def resume_after_stages(make_trainer, folder: Path, **options) -> tuple[DevFTTrainer, dict[int, DevFTTrainer]]:
    """Train a run of three stages, and again from the folders of its first two: (the whole, {stage: what went on})."""
    options = {"stage_layers": [2, 3, 4]} | options
    whole, resumed = make_trainer(output_dir=folder / "whole", **options), {}
    whole.train()
    for stage in (1, 2):
        resumed[stage] = make_trainer(output_dir=folder / f"resumed-{stage}", **options)
        resumed[stage].train(resume_from_checkpoint=str(folder / "whole" / f"stage-{stage}"))
    return whole, resumed


# Rules by which a layer's adapter is no other layer's.
ANCHORS = dict.fromkeys(("fusion", "adapter_fusion", "transfer"), "anchor")


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | kwargs)


def config(output_dir, **kwargs) -> DevFTConfig:
    defaults = {
        "stage_layers": [2, 4],
        "stage_rounds": [2],
        "num_clients": 4,
        "local_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "overwrite_output_dir": True,  # tests start several runs in one folder
    }
    return DevFTConfig(output_dir=str(output_dir), **defaults | kwargs)


@pytest.fixture
def make_trainer(tmp_path, tasks, tokenizer):
    """A `DevFTTrainer` on a tiny model; keyword arguments of the trainer, the rest goes into its config."""

    def make(*, model=None, train_dataset=None, peft_config=None, output_dir=None, cls=DevFTTrainer, **kwargs):
        passed = {name: kwargs.pop(name) for name in list(kwargs) if name in _TRAINER_ARGUMENTS}
        if kwargs.get("healing_steps") or kwargs.get("distillation_steps") or kwargs.get("fusion") == "bridge":
            passed.setdefault("calibration_dataset", task_dataset(8, seed=1))
        return cls(
            model if model is not None else tiny_llama(),
            config(output_dir or tmp_path / "run", **kwargs),
            peft_config=lora() if peft_config is None and not isinstance(model, PeftModel) else peft_config,
            train_dataset=tasks if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            **passed,
        )

    return make


_TRAINER_ARGUMENTS = {
    "remote_clients",
    "eval_dataset",
    "calibration_dataset",
    "callbacks",
    "data_collator",
    "partitioner",
    "optimizers",
    "model_init",
    "compute_loss_func",
    "compute_metrics",
}
