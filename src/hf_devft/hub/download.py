"""Read what is on the Hub: a stage to go on from, or an adapter. Nothing pickled is downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from peft.utils import CONFIG_NAME

from hf_devft.files import CHECKSUMS
from hf_devft.models.adapter_files import ADAPTER_WEIGHTS
from hf_devft.models.layer_files import healed_path


@contextmanager
def _reading(repo_id: str) -> Iterator[None]:
    """Turn what goes wrong with a repository into a ValueError that names it."""
    try:
        yield
    except (OSError, HFValidationError, HTTPError) as error:
        raise ValueError(f"{repo_id} is neither a folder nor a readable repository: {error}") from error


def newest_commit(repo_id: str, revision: str | None = None, token: str | None = None) -> str:
    """Ask for the commit that a repository's branch stands at.

    Raises:
        ValueError: the repository cannot be read.
    """
    with _reading(repo_id):
        return HfApi(token=token).model_info(repo_id, revision=revision).sha


def download_stage(repo_id: str, revision: str | None = None, token: str | None = None, healed: bool = False) -> str:
    """Download the newest stage of a repository, no more than a run needs to go on; returns the local folder.

    Args:
        healed: whether the run has healed its submodels, whose layers it needs then.

    Raises:
        ValueError: the repository cannot be read.
    """
    with _reading(repo_id):
        patterns = ["*.json", ADAPTER_WEIGHTS, *([str(healed_path("*", "*"))] if healed else [])]
        return snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns)


def fetch_adapter(
    name_or_path: str | Path, subfolder: str = "", revision: str | None = None, token: str | None = None
) -> Path:
    """Find an adapter in a folder, or download it from a repository, with the healed layers that it may be for;
    returns the local folder.

    Raises:
        ValueError: the repository cannot be read.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / subfolder
    files = [
        str(PurePosixPath(subfolder) / name)
        for name in (CONFIG_NAME, ADAPTER_WEIGHTS, CHECKSUMS, healed_path("", "*"))
    ]
    with _reading(str(name_or_path)):
        folder = snapshot_download(str(name_or_path), revision=revision, token=token, allow_patterns=files)
    return Path(folder) / subfolder
