"""The environment of the processes that tests start."""

import os
from pathlib import Path

import hf_devft


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """This one's, with one thread a process, this process's `hf_devft` and the modules of some folders."""
    path = [str(folder) for folder in (*folders, Path(hf_devft.__file__).parents[1])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)} | variables
