"""The bases that the benchmarks of speed train, and what they train on."""

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_devft.embedded import BASE_PATH, task_dataset
from hf_devft.tasks.data import load_files, to_known_columns, tokenize


MAX_LENGTH = 512


def quickstart_base() -> PreTrainedModel:
    """The embedded one, 16 layers."""
    return AutoModelForCausalLM.from_pretrained(BASE_PATH)


def larger_base() -> PreTrainedModel:
    """Random weights, 61 M parameters in 12 layers, for the embedded tokenizer."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=640, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=10,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


# Name -> (makes the base, the layers of its stages).
BASES = {"quickstart": (quickstart_base, [4, 8, 16]), "larger": (larger_base, [3, 6, 12])}


def make_base(name: str) -> PreTrainedModel:
    """A base in single precision."""
    return BASES[name][0]().float()


def size_of(model: PreTrainedModel) -> str:
    """Its parameters, as in "55 M"."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} M"


def lora(rank: int = 8) -> LoraConfig:
    """A new adapter's config."""
    return LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_PATH)


def rows(count: int) -> Dataset:
    """Made-up tasks as token ids, and nothing else."""
    return _encoded(task_dataset(count), tokenizer())


def rows_of_file(base: str, path: str, count: int) -> Dataset:
    """The first prompts and answers of a file, likewise, for a base of another folder or name."""
    return _encoded(load_files([path], to_known_columns).select(range(count)), AutoTokenizer.from_pretrained(base))


def _encoded(dataset: Dataset, encoder: PreTrainedTokenizerBase) -> Dataset:
    return tokenize(dataset, encoder, MAX_LENGTH).select_columns(["input_ids", "labels"])
