import socket
import subprocess
import sys

import pytest

from hf_devft.network.local import local_federation


STAYS = """
import sys, time
from pathlib import Path
from hf_devft.network.local import local_federation

with local_federation(Path(sys.argv[1])) as federation:
    print(federation.port, flush=True)
    time.sleep(600)
"""


def test_a_process_that_is_told_to_end_leaves_none_of_its_own_behind(tmp_path):
    with subprocess.Popen([sys.executable, "-c", STAYS, str(tmp_path / "it")], stdout=subprocess.PIPE) as process:
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            process.terminate()
        process.wait(60)
    with socket.socket() as trial:
        assert trial.connect_ex(("127.0.0.1", port)) != 0, "the SuperLink still answers"


def test_a_folder_of_other_files_is_not_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than a federation's files"), local_federation(tmp_path):
        raise AssertionError
    assert (tmp_path / "thesis.tex").exists()
