"""How idle threads wait."""

import subprocess
import sys

import pytest
from launching import environment


CODE = """
import os, sys
from hf_devft.cli.train import main
try:
    main(["--nothing"])
except SystemExit as end:
    assert "unknown key" in str(end)
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(("given", "expected"), [
    ({}, "300"),
    ({"GOMP_SPINCOUNT": "7"}, "7"),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
])  # fmt: skip
def test_threads_sleep_soon_unless_the_environment_says_how(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):  # of a command that has run in this process
        monkeypatch.delenv(name, raising=False)
    printed = subprocess.check_output([sys.executable, "-c", CODE], env=environment(**given), text=True)
    assert printed.split() == [expected]
