"""What a run writes, damaged or forged, and loaded by every public way in.

    python tests/hostile_files.py --mutations 2400 --results benchmarks/results/hostile_files.md

Half of the mutations are damage: the list of checksums is as the run has written it. The other half are forged, with
checksums that fit, by somebody who may write what they like. Each must end in a `ValueError` or `OSError` that names
the file or its folder, or in what the file says: without damage the run's own result, and of a forged file no value
that is not finite.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import random
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import config, lora, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_devft import DevFTTrainer, StageConfig, load_submodel
from hf_devft.embedded import BASE_PATH, task_dataset
from hf_devft.files import CHECKSUMS, note_checksum
from hf_devft.hub.push import finished_stages, stage_push


SECONDS = 30  # after which a way in is said to hang
STAGE, CHECKPOINT = "stage-1", "checkpoint-3"
Result = dict[str, Any]


# --- the run, and the ways in ---------------------------------------------------------------------------------------


def make_trainer(folder: Path, **kwargs: Any) -> DevFTTrainer:
    """Make a trainer whose files have all that files can have: healed layers, memory, a schedule's state."""
    given = kwargs.pop("peft_config", None)
    options = {
        "local_steps": 1, "save_strategy": "steps", "save_steps": 1, "federated_method": "fedsa_lora+fedavgm",
        "healing_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps",
        "generation_max_new_tokens": 2, "num_clients": 2, "eval_steps": 1,
    }  # fmt: skip
    return DevFTTrainer(
        tiny_llama(),
        config(folder, **options | kwargs),
        peft_config=given or lora(rank_pattern={"q_proj": 1}),
        train_dataset=task_dataset(16, seed=0),
        eval_dataset=task_dataset(2, seed=1),
        calibration_dataset=task_dataset(4, seed=2),
        processing_class=AutoTokenizer.from_pretrained(BASE_PATH),
    )


def record(run: Path) -> Result:
    """`StageConfig.from_pretrained`."""
    return asdict(StageConfig.from_pretrained(run, subfolder=STAGE))


def submodel(run: Path) -> Result:
    """`load_submodel`."""
    model = load_submodel(tiny_llama(), run, stage=1)
    with torch.no_grad():
        return {"logits": model(torch.arange(8)[None]).logits}


def adapter(run: Path) -> Result:
    """`DevFTTrainer(peft_config=...)`."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), peft_config=str(run / STAGE))
        return dict(trainer.run.adapter.state)


def stage(run: Path) -> Result:
    """`train(resume_from_checkpoint="stage-1")`."""
    return resumed(run, STAGE)


def checkpoint(run: Path) -> Result:
    """`train(resume_from_checkpoint="checkpoint-3")`."""
    return resumed(run, CHECKPOINT)


def resumed(run: Path, name: str) -> Result:
    """What a run that goes on ends with, and what it says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        trainer.train(resume_from_checkpoint=str(run / name))
        records = [asdict(record) | {"totals": {}, "metrics": losses(record)} for record in trainer.stages]
        spent = {"bytes": trainer.ledger.bytes, "rounds": len(trainer.ledger.rounds), "flops": trainer.ledger.flops}
        return {**trainer.run.adapter.state, "stages": records, **spent}


def losses(record: StageConfig) -> dict[str, Any]:
    """What a stage's record has measured that no clock has."""
    return {key: value for key, value in record.metrics.items() if key.endswith("loss")}


def push(run: Path) -> Result:
    """What a push of the stage would commit."""
    stages = finished_stages(run)
    return {operation.path_in_repo: "" for operation in stage_push(run, stages[0]).operations()}


# Way in -> the files that it may read.
WAYS: dict[Callable[[Path], Result], tuple[str, ...]] = {
    record: (f"{STAGE}/stage_config.json",),
    submodel: (
        f"{STAGE}/stage_config.json", f"{STAGE}/submodel/adapter_config.json",
        f"{STAGE}/submodel/adapter_model.safetensors", f"{STAGE}/submodel/healed-1.safetensors",
    ),
    adapter: (f"{STAGE}/adapter_config.json", f"{STAGE}/adapter_model.safetensors"),
    stage: tuple(
        f"{STAGE}/{name}"
        for name in (
            "devft_state.json", "ledger.json", "trainer_state.json", "federation.safetensors",
            "adapter_model.safetensors", "adapter_config.json", "submodel/healed-1.safetensors",
        )
    ),
    checkpoint: tuple(
        f"{CHECKPOINT}/{name}"
        for name in (
            "devft_state.json", "ledger.json", "trainer_state.json", "federation.safetensors", "schedule.json",
            "adapter_model.safetensors", "adapter_config.json", "submodel/adapter_model.safetensors",
            "submodel/adapter_config.json",
        )
    ),
    push: ("stage_config.json",),
}  # fmt: skip


# --- mutations ------------------------------------------------------------------------------------------------------

STRANGE = (
    None, True, -1, 0, 7, 10**9, 1e308, -8.0, math.nan, math.inf, "", "x", "../../etc/passwd", "(a+)+$", "x" * 10**5,
    [], [None], [[]], {}, {"x": 1}, [0, 0], ["(.*)*x"], {"(a|a)*b": 2}, "(.*,)*b" * 20,
)  # fmt: skip


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of JSON."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from places(content[key])


def change_json(path: Path, rng: random.Random) -> str:
    """Change one place."""
    content = json.loads(path.read_text())
    # As often near the top as far below, where most places are.
    found = list(places(content))
    near = [(container, key) for container, key in found if container is content] or found
    container, key = rng.choice(rng.choice([near, found]))
    kind = rng.choice(["value", "value", "value", "gone", "renamed", "twice", "shuffled"])
    if kind == "value" or not isinstance(container, (dict, list)):
        container[key] = copy.deepcopy(rng.choice(STRANGE))
    elif kind == "gone":
        del container[key]
    elif kind == "renamed" and isinstance(container, dict):
        container[rng.choice(["x", f"{key}s", key.upper()])] = container.pop(key)
    elif kind == "twice" and isinstance(container, list):
        container.append(copy.deepcopy(container[key]))
    elif isinstance(container, list):
        rng.shuffle(container)
    else:
        values = list(container.values())
        rng.shuffle(values)
        container |= dict(zip(container, values, strict=True))
    path.write_text(json.dumps(content))
    return f"{kind} at {key!r}"


def change_tensors(path: Path, rng: random.Random) -> str:
    """Change one tensor, or its name."""
    state = load_file(path)
    name = rng.choice(sorted(state))
    tensor, kind = state[name], rng.choice(["value", "type", "shape", "gone", "renamed", "more", "empty", "other"])
    if kind == "value":
        values = tensor.float().clone()
        if values.numel():
            values.view(-1)[rng.randrange(values.numel())] = rng.choice([math.nan, math.inf, 3e38, -3e38, 1e12])
        state[name] = values
    elif kind == "type":
        types = [torch.int32, torch.bool, torch.float8_e4m3fn, torch.uint8, torch.complex64]
        state[name] = tensor.to(rng.choice(types))
    elif kind == "shape":
        state[name] = rng.choice([tensor.reshape(-1), tensor[None], tensor.expand(2, *tensor.shape)]).contiguous()
    elif kind == "gone":
        del state[name]
    elif kind == "renamed":
        state[rng.choice(["x", "99/kept/x", f"{name}.x", name.replace("0", "7")])] = state.pop(name)
    elif kind == "more":
        state["base_model.model.model.layers.9.x"] = tensor
    elif kind == "empty":
        state = {}
    else:
        state[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(rng.randrange(99)))
    save_file({key: value.clone() for key, value in state.items()}, path)
    return f"{kind} of {name}"


def change_bytes(path: Path, rng: random.Random) -> str:
    """Change bytes, whatever they are."""
    data, kind = bytearray(path.read_bytes()), rng.choice(["cut", "flipped", "flipped", "none", "other", "longer"])
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "none":
        data = bytearray()
    elif kind == "other":
        data = bytearray(rng.randbytes(64))
    else:
        data += rng.randbytes(16)
    path.write_bytes(data)
    return f"bytes {kind}"


def change_file(path: Path, rng: random.Random) -> str:
    """Put something else in its place."""
    kind = rng.choice(["gone", "folder", "pipe", "endless", "nested", "huge", "exchanged"])
    others = sorted(other for other in path.parent.glob("*.*") if other.is_file() and other != path)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "nested":
        path.write_text("[" * 200_000)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)  # of holes
    elif kind == "exchanged":
        shutil.copyfile(rng.choice(others), path)
    return kind


@dataclass(frozen=True)
class Mutation:
    """One of a file of the run, by a seed; forged: with a checksum that fits."""

    way: Callable[[Path], Result]
    file: str
    seed: int
    forged: bool

    def apply(self, run: Path) -> str:
        """Change the file, in place; returns how."""
        rng, path = random.Random(f"{self.file} {self.seed}"), run / self.file
        structured = change_json if path.suffix == ".json" else change_tensors
        how = rng.choice([structured, structured, structured, change_bytes, change_file])(path, rng)
        listed = path.parent / CHECKSUMS
        if self.forged and listed.exists():
            if path.is_file() and path.stat().st_size < 2**30:
                note_checksum(path)
            else:
                listed.unlink()
        return how


def mutations(count: int) -> list[Mutation]:
    """So many, over all ways in and files."""
    pairs = [(way, file) for way, files in WAYS.items() for file in files]
    return [
        Mutation(*pairs[i % len(pairs)], seed=i // len(pairs), forged=i // len(pairs) % 2 == 1) for i in range(count)
    ]


# --- what they come to ----------------------------------------------------------------------------------------------

CLEAR, RIGHT, TAKEN = "clear error", "the run's own result", "what the file says"
NAMELESS, WRONG, OTHER, NAN, HANGS = "error without a name", "wrong exception", "another result", "not finite", "hang"
GOOD = {False: (CLEAR, RIGHT), True: (CLEAR, RIGHT, TAKEN)}  # forged or not


class HangError(BaseException):
    """A way in took too long."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_finite(value: Any) -> bool:
    """Whether all numbers in a result are."""
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.allclose(one, other, atol=1e-6)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    return bool(one == other)


def outcome(mutation: Mutation, run: Path, expected: Result) -> tuple[str, str]:
    """Load what was changed; returns the kind of what it comes to, and details."""
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = mutation.way(run)
    except HangError:
        return HANGS, ""
    except (ValueError, OSError) as error:
        names = str(error), str(getattr(error, "filename", "") or "")
        is_named = any(part in text for part in (str(run), Path(mutation.file).name) for text in names)
        return CLEAR if is_named else NAMELESS, f"{type(error).__name__}: {error}"
    except Exception as error:
        return WRONG, f"{type(error).__name__}: {error}"
    if is_same(found, expected):
        return RIGHT, ""
    if not is_finite(found):
        return NAN, ""
    return (TAKEN if mutation.forged else OTHER), ""


class Specimen:
    """A run on the disk, and copies of it to change."""

    def __init__(self, folder: Path):
        self._run, self._copies = folder / "run", folder / "copies"
        trainer = make_trainer(self._run)
        trainer.train()
        self._expected = {way: way(self._run) for way in WAYS}

    def outcome(self, mutation: Mutation) -> tuple[str, str]:
        """Apply a mutation to a copy; returns the kind of what it comes to, and how."""
        run = self._copies / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self._run, run)
        how = mutation.apply(run)
        kind, details = outcome(mutation, run, self._expected[mutation.way])
        return kind, f"{mutation.way.__name__}, {mutation.file}, seed {mutation.seed}, {how}: {details}"


def table(counts: Counter[tuple[bool, str]]) -> list[str]:
    """A row for each kind."""
    lines = ["| comes to | damaged | forged |", "|---|---:|---:|"]
    for kind in (CLEAR, RIGHT, TAKEN, NAMELESS, WRONG, OTHER, NAN, HANGS):
        lines.append(f"| {kind} | {counts[False, kind]} | {counts[True, kind]} |")
    total = [sum(count for (forged, _), count in counts.items() if forged is which) for which in (False, True)]
    return [*lines, f"| all | {total[0]} | {total[1]} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2400)
    parser.add_argument("--first", type=int, default=0, help="the first of them, to go on")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts: Counter[tuple[bool, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        specimen = Specimen(Path(folder))
        for mutation in mutations(options.mutations)[options.first :]:
            kind, how = specimen.outcome(mutation)
            counts[mutation.forged, kind] += 1
            if kind not in GOOD[mutation.forged]:
                print(f"{kind}: {'forged' if mutation.forged else 'damaged'}, {how}"[:600], flush=True)
    lines = [*table(counts), "", f"`python tests/hostile_files.py --mutations {options.mutations}`."]
    print("\n".join(lines))
    if options.results is not None:
        options.results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
