"""The examples, run as they stand in a folder of their own."""

import subprocess
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_clients_then_load_a_stage(tmp_path):
    def run(*command):
        result = subprocess.run(
            [sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(EXAMPLES / "own_clients.py")
    answer = run(EXAMPLES / "load_stage.py", "outputs/own-clients/stage-2", "Repeat these words: red cat milk")
    assert answer.strip()
