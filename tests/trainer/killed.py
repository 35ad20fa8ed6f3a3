"""Kill runs at random moments and go on with them: `killed.py FOLDER KILLS SEED`, prints what it saw as JSON.

Each run is a fork of this process, which has imported everything but computed nothing.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import launched


OPTIONS = {
    "stage_layers": [2, 3, 4],
    "stage_rounds": [3],
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    "resume_from_checkpoint": "last",
}


def start(output: Path) -> int:
    """A run in a process of its own."""
    if (process := os.fork()) == 0:
        code = 1
        try:
            launched.main(OPTIONS | {"output_dir": str(output)})
            code = 0
        finally:
            os._exit(code)
    return process


def main(folder: Path, kills: int, seed: int) -> dict:
    """Runs with random kills until there were `kills` of them, beside one that is left alone."""
    begun = time.monotonic()
    _, status = os.waitpid(start(folder / "whole"), 0)
    assert status == 0, "the run that is left alone failed"
    duration = time.monotonic() - begun
    rng, runs, killed, when = random.Random(seed), 0, 0, []
    while killed < kills:
        output, runs = folder / f"run-{runs}", runs + 1
        finished = False
        while not finished:
            process = start(output)
            # Half of the kills come late in what is left, where stages change and the last files are written.
            delay = rng.choice([rng.uniform(0, duration), rng.uniform(0.6 * duration, duration)])
            if killed >= kills:
                delay = 60 * duration
            finished = wait(process, delay)
            if not finished:
                killed += 1
                when.append(sorted(path.name for path in output.glob("*")) if output.exists() else [])
    return {"duration": duration, "runs": runs, "kills": killed, "found": when}


def wait(process: int, seconds: float) -> bool:
    """Whether the process ends by itself in time; it is killed where it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert status == 0, "a run that was gone on with failed"
            return True
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return status == 0


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
