"""Kill runs at random moments, go on with them, and compare what they leave with a run that was left alone.

`python tests/kills.py --results benchmarks/results/kills.md`: runs of one process, of two (`accelerate launch`), and
over a network on this machine, where the server or a node is killed. About 20 minutes on two cores.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "trainer"), str(HERE / "network")]

import psutil  # noqa: E402
from conftest import tiny_llama  # noqa: E402
from killed import OPTIONS  # noqa: E402
from killed import main as kill_forks  # noqa: E402
from launching import environment  # noqa: E402
from server_apps import kill_server_apps  # noqa: E402
from test_recovery import contents  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from hf_devft.configuration.stage_folder import FEDERATION  # noqa: E402
from hf_devft.embedded import BASE_PATH, task_dataset  # noqa: E402
from hf_devft.network.local import LocalFederation, local_federation  # noqa: E402
from hf_devft.network.server_app import TRAFFIC_NAME  # noqa: E402


LAUNCHED = HERE / "trainer" / "launched.py"
RECIPE = HERE.parent / "recipes" / "federation"
NODES = ("org-a", "org-b", "org-c")
# Every client is needed and no round is tried again, so that a node that is gone stops the run, which is gone on with
# when it is back: a second attempt is another round than the one of the run that is left alone, and in the ledger.
NETWORK = OPTIONS | {
    "stage_layers": [2, 4],
    "clients_per_round": 3,
    "round_quorum": 3,
    "round_retries": 0,
    "local_steps": 2,
    "per_device_train_batch_size": 4,
    "federated_method": "scaffold",
    "lora_r": 4,
    "task_eval_rows": 8,
    "use_cpu": True,
    "save_steps": 1,
    "disable_tqdm": True,
}


def kill_processes(folder: Path, kills: int, rng: random.Random) -> int:
    """Kill a random one of two processes or their launcher, and what is left of the run; returns how many runs."""
    config = HERE.parent / "recipes" / "accelerate" / "cpu-2.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]

    def start(output: Path) -> subprocess.Popen:
        options = json.dumps(OPTIONS | {"output_dir": str(output)})
        return subprocess.Popen(
            [sys.executable, *launcher, LAUNCHED, options],
            env=environment(LAUNCHED.parent, HERE), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def kill(run: subprocess.Popen) -> None:
        os.kill(rng.choice(_family(run.pid)), signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()

    return _kill_and_go_on(folder, kills, rng, start, kill)


def kill_a_federation(folder: Path, kills: int, rng: random.Random) -> int:
    """Kill the server's app or a node, which is started again; returns how many runs."""
    with local_federation(folder / "federation") as federation:
        base, tasks = federation.folder / "base", task_dataset(60, seed=0)
        tiny_llama().save_pretrained(base)
        AutoTokenizer.from_pretrained(BASE_PATH).save_pretrained(base)
        config = federation.folder / "config.json"
        config.write_text(json.dumps(NETWORK | {"model_name_or_path": str(base)}))
        for number, name in enumerate(NODES):
            rows = tasks.select(range(20 * number, 20 * number + 15 + number))
            rows.select_columns(["prompt", "completion"]).to_json(federation.folder / f"{name}.jsonl")
            _start_node(federation, name)

        def stay() -> None:
            """Start again what the SuperLink did not admit, as it had not noticed that the node before was dead."""
            while not ended.wait(2.0):
                for name in NODES:
                    process = federation.processes.get(name)
                    if process is not None and process.poll() is not None:
                        _start_node(federation, name)

        def start(output: Path) -> subprocess.Popen:
            options = {"config": str(config), "clients": " ".join(NODES), "timeout": 20.0}
            return federation.run(RECIPE, options | {"overrides": f"--output_dir {output}"})

        def kill(run: subprocess.Popen) -> None:
            victim = rng.choice(["server", *NODES])
            if victim == "server":
                kill_server_apps(federation)
                run.kill()
            else:
                federation.stop(victim, signal.SIGKILL)
                _start_node(federation, victim)
            run.communicate()  # a run that misses a node ends by itself

        ended = threading.Event()
        supervisor = threading.Thread(target=stay)
        supervisor.start()
        try:
            # Flower's command ends well, however its run ends.
            return _kill_and_go_on(folder, kills, rng, start, kill, lambda output: (output / TRAFFIC_NAME).exists())
        finally:
            ended.set()
            supervisor.join()


def _kill_and_go_on(
    folder: Path,
    kills: int,
    rng: random.Random,
    start: Callable[[Path], subprocess.Popen],
    kill: Callable[[subprocess.Popen], None],
    has_ended: Callable[[Path], bool] = Path.exists,
) -> int:
    """Kill runs until `kills` have met one that was under way; all must end as the one that was left alone.

    Args:
        has_ended: (output folder) -> whether a run has, whose process has said that all is well.
    """
    begun = time.monotonic()
    whole = start(folder / "whole")
    whole.communicate()
    assert whole.returncode == 0, "the run that is left alone failed"
    assert has_ended(folder / "whole"), "the run that is left alone failed"
    duration, runs, killed, failures = time.monotonic() - begun, 0, 0, 0
    while killed < kills:
        output, runs = folder / f"run-{runs}", runs + 1
        while True:
            run = start(output)
            try:
                run.wait(rng.uniform(0, 0.8 * duration) if killed < kills else 20 * duration)
            except subprocess.TimeoutExpired:
                kill(run)
                killed += 1
                print(f"{killed} kills, {runs} runs", end="\r", file=sys.stderr, flush=True)
                continue
            run.communicate()
            if run.returncode == 0 and has_ended(output):
                break
            failures += killed >= kills  # a node may not be back yet
            assert failures < 10, f"{output} fails, though nothing is killed any more"
        assert_same(output, folder / "whole")
    return runs


def assert_same(run: Path, whole: Path) -> None:
    """Whatever does not depend on the time must be the same; says what is not."""
    found, expected = contents(run), contents(whole)
    for each in (found, expected):  # over a network, it has the run's own random number
        each["adapters"] = {name: state for name, state in each["adapters"].items() if FEDERATION not in name}
    assert found["files"] == expected["files"], f"{run} has {found['files']}"
    rounds = [pair for pair in zip(found["ledger"], expected["ledger"], strict=True) if pair[0] != pair[1]]
    adapters = found["adapters"].keys() ^ expected["adapters"].keys()
    adapters |= {name for name, state in found["adapters"].items() if state != expected["adapters"].get(name)}
    if rounds or adapters:
        raise AssertionError(f"{run}: adapters {sorted(adapters)} differ, and rounds {rounds}")


def _family(process: int) -> list[int]:
    """A process and all that it has started."""
    return [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]


def _start_node(federation: LocalFederation, name: str) -> None:
    folder = federation.folder
    files = ["--train_file", f"{folder}/{name}.jsonl", "--output_dir", f"{folder}/node-{name}"]
    federation.start_node(name, [*files, "--model_name_or_path", f"{folder}/base", "--use_cpu", "true"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--single", type=int, default=60)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--network", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("outputs/kills.md"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        rng = random.Random(args.seed)
        if args.single:
            seen = kill_forks(place / "single", args.single, args.seed)
            for number in range(seen["runs"]):
                assert_same(place / "single" / f"run-{number}", place / "single" / "whole")
            rows.append(("one process", seen["kills"], seen["runs"]))
        if args.processes:
            rows.append(("two processes", args.processes, kill_processes(place / "two", args.processes, rng)))
        if args.network:
            rows.append(("network", args.network, kill_a_federation(place / "network", args.network, rng)))
    lines = ["| run | SIGKILLs | runs, all as the one left alone, bit for bit |", "|---|---|---|"]
    lines += [f"| {name} | {kills} | {runs} |" for name, kills, runs in rows]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
