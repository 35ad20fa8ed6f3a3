"""Similarity and fusion of a large base, against reading it once: `python benchmarks/grouping.py`.

Makes a base of 32 layers and 1.6 GB, by name (its layers are read from the checkpoint when they are needed). Each
measurement is a process of its own; with the base there, the system's cache is emptied (as root), so that "from disk"
is true, or the file is read once more, so that it is in memory. Peaks are above the memory before the base was there.
Writes `results/grouping.md`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bases import tokenizer
from machine import parser, publish


LAYERS, CAPACITY = 32, 8
STEPS = ("read", "similarity", "fusion", "both")


def make_base(folder: Path) -> tuple[float, float]:
    """Save a base; returns the MB of one layer and of what all share."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS, num_attention_heads=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters()) / 1e6
    return layer, sum(parameter.nbytes for parameter in model.parameters()) / 1e6 - LAYERS * layer


def prepare(folder: Path, cached: bool) -> None:
    """Put the checkpoint into the system's cache, or out of it."""
    if cached:
        for path in folder.glob("*.safetensors"):
            read(path)
    else:
        os.sync()
        with suppress(PermissionError):
            Path("/proc/sys/vm/drop_caches").write_text("3")


def read(path: Path) -> None:
    """Once, from front to back."""
    buffer = bytearray(2**24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def measure(folder: Path, step: str, cached: bool) -> tuple[float, float]:
    """Seconds, and the peak in MB."""
    import torch

    from hf_devft.models.layer_stack import find_layer_stack
    from hf_devft.models.streaming import load_base
    from hf_devft.run.peak_memory import PeakMemory
    from hf_devft.stages.grouping import GroupingTask, group_layers, similarity_of, weight_gram
    from hf_devft.stages.submodel import build_submodel

    memory = PeakMemory(torch.device("cpu"))
    memory.release()
    memory.reset()
    before = memory.read()
    base = load_base(str(folder), dtype=torch.float32)
    stack = find_layer_stack(base)
    even = group_layers(GroupingTask(stack.kinds, CAPACITY), "even")
    works: dict[str, Callable] = {
        "read": lambda: [read(path) for path in folder.glob("*.safetensors")],
        "similarity": lambda: similarity_of(weight_gram(stack)),
        "fusion": lambda: build_submodel(base, stack, even, "differential"),
    }
    prepare(folder, cached)
    started = time.perf_counter()
    held = [works[name]() for name in (("similarity", "fusion") if step == "both" else (step,))]
    seconds = time.perf_counter() - started
    peak = memory.read()
    del held
    return seconds, (peak - before) / 1e6


def main() -> None:
    command_line = parser("grouping", __doc__)
    command_line.add_argument("--repeats", type=int, default=3)
    command_line.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = command_line.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1], options.measure[2] == "cached")))
        return
    with tempfile.TemporaryDirectory() as folder:
        layer, shared = make_base(Path(folder))
        found = {}
        for _ in range(options.repeats):
            for cached in (False, True):
                for step in STEPS:
                    command = [sys.executable, __file__, "--measure", folder, step, "cached" if cached else "cold"]
                    out = subprocess.check_output(command, text=True, stderr=subprocess.PIPE)
                    found.setdefault((cached, step), []).append(json.loads(out.splitlines()[-1]))
    lines = [
        "| | from disk, s | / reading it once | from memory, s | / reading it there once | peak, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for step in STEPS:
        cells = []
        for cached in (False, True):
            own, once = (statistics.median(second for second, _ in found[cached, each]) for each in (step, "read"))
            cells.append(f"{own:.2f} | {own / once:.2f}")
        peak = statistics.median(peak for cached in (False, True) for _, peak in found[cached, step])
        lines.append(f"| {step} | {' | '.join(cells)} | {peak:.0f} |")
    lines += [
        "",
        f"A layer has {layer:.0f} MB, the submodel of {CAPACITY} layers with what is shared "
        f"{CAPACITY * layer + shared:.0f} MB, the base {LAYERS * layer + shared:.0f} MB.",
    ]
    publish(options.results, lines, f"grouping.py --repeats {options.repeats}", "medians")


if __name__ == "__main__":
    main()
