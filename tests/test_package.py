"""The wheel, built from the sdist, in an environment that has nothing else of ours."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
LISTS = "import hf_devft, hf_devft.cli.configs as a; print(hf_devft.__file__, *a.packaged_configs(), sep='\\n')"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with our wheel, and with what it needs from this one."""
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # A path that is added so does not bring the packages that are installed there for editing, as ours is.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    own = folder / "venv" / "bin" / "python"
    # Whatever is installed for editing next door, and without what this process may look for modules in.
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    install = [sys.executable, "-m", "pip", "--python", own, "install", *options, wheel]
    subprocess.run(install, check=True, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    return own


def said(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_the_command_and_the_configs(python, tmp_path):
    where, *configs = said(python, "-c", LISTS, folder=tmp_path).splitlines()
    assert Path(where).is_relative_to(python.parents[1])
    assert configs == sorted(path.stem for path in (ROOT / "recipes" / "configs").glob("*.yaml"))
    assert "quickstart" in said(python.with_name("devft"), "--help", folder=tmp_path)
    planned = said(python.with_name("devft"), "plan", "--config", "fedit", folder=tmp_path)
    assert "sent, TFLOPs: by all in all rounds" in planned
