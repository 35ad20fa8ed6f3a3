"""Make the embedded base: its tokenizer, its pre-training corpus and its weights.

    python recipes/pretrain_base.py --output_dir build/base

The model is pre-trained shallow and then grown (4 -> 8 -> 16 layers), because a CPU pays for every
layer (progressive stacking, Gong et al., ICML 2019): each growth puts every layer twice and halves what
the two add to the residual stream, which nearly keeps the function (our choice). The last phase drops
each layer with probability 0.2 per step (LayerDrop: Fan et al. 2020, arXiv 1909.11556), so that depth is
redundant in this small model as it is in large ones. Nine tokens in ten come from the task generator;
the rest are docstrings of the running Python's standard library.

The shipped weights took 75 minutes on two CPU cores that were also used for other work. Their second phase was
planned for 2000 steps and stopped at 1500, so a new run gives a model of the same kind, not the same one.

A phase that is finished is not repeated, and an unfinished one goes on from its last checkpoint.
"""

import ast
import itertools
import random
import statistics
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_devft.embedded.families import FAMILIES, NEW, RARE, SEEN, generate, split_of, task_dataset
from hf_devft.tasks.data import tokenize
from hf_devft.tasks.generation import generate_answers
from hf_devft.tasks.metrics import ExactMatch


BLOCK = 256
BATCH = 16
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
# A rare family's share of the task rows is 1/20 of a seen one's: together about one row in forty.
TASK_WEIGHTS = dict.fromkeys(SEEN, 1.0) | dict.fromkeys(RARE, 0.05)


@dataclass
class PretrainArguments:
    output_dir: str = field(default="build/base", metadata={"help": "Where phases and the finished base go."})
    phase_layers: list[int] = field(default_factory=lambda: [4, 8, 16], metadata={"help": "Depth of each phase."})
    phase_steps: list[int] = field(default_factory=lambda: [2500, 1500, 3000], metadata={"help": "Steps of each."})
    phase_rates: list[float] = field(default_factory=lambda: [3e-3, 2e-3, 1.5e-3], metadata={"help": "Peak rates."})
    layer_drop: float = field(default=0.2, metadata={"help": "LayerDrop probability in the last phase."})
    hidden_size: int = 128
    intermediate_size: int = 352
    vocab_size: int = 2048
    seed: int = 0


def docstrings(split: str) -> list[str]:
    """The docstrings (over 200 characters) of the standard library, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "lib2to3"} & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                texts.append(ast.get_docstring(node) or "")
    return [text for text in dict.fromkeys(texts) if len(text) > 200 and split_of(text) == split]


def train_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE (any text encodes), digits one by one so that arithmetic has fixed columns."""
    rows = itertools.islice(generate(TASK_WEIGHTS, "train", seed), 40_000)
    texts = docstrings("train") + [row["prompt"] + row["completion"] for row in rows]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=2048
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def corpus(tokenizer: PreTrainedTokenizerBase, split: str, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (input_ids, labels): tasks as plain text or as a chat, answers labelled; docstrings, all labelled."""
    rng = random.Random(seed)
    tasks, texts = generate(TASK_WEIGHTS, split, seed), docstrings(split)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    eos = tokenizer.eos_token_id
    while True:
        # A docstring is cut to BLOCK tokens and is about six task rows long: 1.5 % of the rows, 10 % of the tokens.
        if rng.random() < 0.015:
            ids = (encode(rng.choice(texts)) + [eos])[:BLOCK]
            yield ids, ids
            continue
        row = next(tasks)
        prompt, completion = row["prompt"], row["completion"]
        if rng.random() < 0.2:
            prompt, completion = f"<|user|>{prompt.removesuffix('Answer:').strip()}<|assistant|>", completion.strip()
        prompt_ids, completion_ids = encode(prompt), encode(completion) + [eos]
        yield prompt_ids + completion_ids, [-100] * len(prompt_ids) + completion_ids


def blocks(tokenizer: PreTrainedTokenizerBase, count: int, split: str, seed: int) -> Dataset:
    """`count` blocks of BLOCK tokens, each filled with whole rows and padded at its end."""

    def fill() -> Iterator[dict[str, list[int]]]:
        rows = corpus(tokenizer, split, seed)
        ids, labels = next(rows)
        for _ in range(count):
            block_ids, block_labels = [], []
            while len(block_ids) + len(ids) <= BLOCK:
                block_ids, block_labels = block_ids + ids, block_labels + labels
                ids, labels = next(rows)
            padding = BLOCK - len(block_ids)
            yield {
                "input_ids": block_ids + [tokenizer.pad_token_id] * padding,
                "labels": block_labels + [-100] * padding,
            }

    return Dataset.from_list(list(fill()))


def grow(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """A model of `layers` layers (a multiple of the old depth): each layer repeated, its output divided."""
    config = LlamaConfig.from_dict(model.config.to_dict() | {"num_hidden_layers": layers})
    grown, copies = LlamaForCausalLM(config), layers // model.config.num_hidden_layers
    grown.load_state_dict(model.state_dict(), strict=False)
    for index, layer in enumerate(grown.model.layers):
        layer.load_state_dict(model.model.layers[index // copies].state_dict())
        layer.self_attn.o_proj.weight.data /= copies
        layer.mlp.down_proj.weight.data /= copies
    return grown


class LayerDropTrainer(Trainer):
    """A Trainer whose every training step leaves out each layer with probability `layer_drop`."""

    layer_drop = 0.0

    def training_step(self, model, *args, **kwargs):
        layers = model.model.layers
        rng = random.Random(f"{self.args.seed}-{self.state.global_step}")
        kept = [layer for layer in layers if rng.random() >= self.layer_drop] or [layers[0]]
        model.model.layers = torch.nn.ModuleList(kept)
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            model.model.layers = layers


def train_phase(model, phase: int, arguments: PretrainArguments, tokenizer, heldout: Dataset) -> LlamaForCausalLM:
    """Train one depth, or load it where it is finished; returns the trained model."""
    folder = Path(arguments.output_dir) / f"phase-{phase}"
    if (folder / "model.safetensors").exists():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    steps, last = arguments.phase_steps[phase], phase == len(arguments.phase_steps) - 1
    training_arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=arguments.phase_rates[phase],
        lr_scheduler_type="cosine" if last else "constant_with_warmup",
        warmup_steps=150,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=100,
        eval_strategy="steps",
        eval_steps=500,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        seed=arguments.seed + phase,
        dataloader_drop_last=True,
    )
    trainer = LayerDropTrainer(
        model=model,
        args=training_arguments,
        train_dataset=blocks(tokenizer, steps * BATCH, "train", arguments.seed + 1 + phase),
        eval_dataset=heldout,
        data_collator=default_data_collator,
    )
    trainer.layer_drop = arguments.layer_drop if last else 0.0
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    trainer.save_model(str(folder))
    return model


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# The embedded base of hf-devft

A Llama of {layers} layers and {parameters:.1f} M parameters, so small that a federated run on it takes minutes on two
CPU cores. It is for trying and testing the package and knows little else than its tasks. Made by
`python recipes/pretrain_base.py{flags}` from the package's task generator and the docstrings of Python's
standard library (PSF licence); no other data.

| | this model | a random init |
|---|---:|---:|
| loss on held-out text (answers and docstrings) | {loss:.3f} | {random_loss:.3f} |
| exact match, {seen} families that it was trained on | {seen_match:.1%} | |
| exact match, {rare} families that it saw little of | {rare_match:.1%} | |
| exact match, {new} families that it never saw | {new_match:.1%} | |

Exact match by family, {rows} held-out rows each, greedy decoding:

| family | seen | exact match |
|---|---|---:|
{families}
"""


def exact_match(model, tokenizer, family: str, rows: int) -> float:
    """Share of held-out rows of a family that the model answers."""
    dataset = tokenize(task_dataset(rows, [family], split="test"), tokenizer, BLOCK)
    answers, references = generate_answers(model, tokenizer, dataset, max_new_tokens=24, batch_size=64)
    return ExactMatch().compute(predictions=answers, references=references)["exact_match"]


def write_card(folder: Path, model, tokenizer, heldout: Dataset, flags: str, rows: int = 25) -> None:
    """Measure the base and a random init of its shape, and write what came out beside the weights."""
    arguments = TrainingArguments(
        output_dir=str(folder.parent), per_device_eval_batch_size=BATCH, report_to="none", disable_tqdm=True
    )
    loss, random_loss = (
        Trainer(candidate, arguments, data_collator=default_data_collator).evaluate(heldout)["eval_loss"]
        for candidate in (model, LlamaForCausalLM(model.config))
    )
    matches = {family: exact_match(model, tokenizer, family, rows) for family in FAMILIES}
    card = CARD.format(
        layers=model.config.num_hidden_layers,
        parameters=model.num_parameters() / 1e6,
        flags=flags,
        loss=loss,
        random_loss=random_loss,
        seen=len(SEEN),
        rare=len(RARE),
        new=len(NEW),
        seen_match=statistics.mean(matches[family] for family in SEEN),
        rare_match=statistics.mean(matches[family] for family in RARE),
        new_match=statistics.mean(matches[family] for family in NEW),
        rows=rows,
        families="\n".join(
            f"| {family} | {amount} | {matches[family]:.0%} |"
            for amount, families in (("much", SEEN), ("little", RARE), ("never", NEW))
            for family in families
        ),
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    (arguments,) = HfArgumentParser(PretrainArguments).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.vocab_size, arguments.seed)
    heldout = blocks(tokenizer, 64, "test", arguments.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.phase_layers[0],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for phase, layers in enumerate(arguments.phase_layers):
        model = train_phase(grow(model, layers), phase, arguments, tokenizer, heldout)
    base = Path(arguments.output_dir) / "final"
    model.to(torch.bfloat16).save_pretrained(base)  # half the bytes
    model.config.dtype = torch.float32  # what it is loaded in: many CPUs compute in bfloat16 slowly, or not at all
    model.config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_card(base, model.float(), tokenizer, heldout, "".join(f" {word}" for word in sys.argv[1:]))


if __name__ == "__main__":
    main()
