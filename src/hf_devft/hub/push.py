"""Commits and tags: what a run has written goes to the Hub beside the training, which never dies of it.

devft push outputs/run me/run     # what a run could not push, or a run made without pushing
"""

import logging
import re
import shlex
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from hf_devft.configuration import STAGE_CONFIG_NAME, StageConfig
from hf_devft.configuration.stage_folder import CLIENTS, FEDERATION, SECRET, SUBMODEL
from hf_devft.files.checksums import sha256
from hf_devft.models.adapter_files import ADAPTER_WEIGHTS


logger = logging.getLogger(__name__)

_STAYS = {FEDERATION, SECRET, CLIENTS}  # on this machine


@dataclass(frozen=True)
class Push:
    """One commit.

    Attributes:
        title: what the commit is, as its message.
        folders: {folder in the repository ("" for the root): local folder}.
        tag: to set on the commit, or None.
        keep: what must live as long as the push: the holder of a temporary folder.
    """

    title: str
    folders: dict[str, Path]
    tag: str | None = None
    keep: Any = None

    def operations(self) -> list[CommitOperationAdd]:
        """Every file of the folders but what stays with the clients, what the noise was drawn by, and links, which may
        lead anywhere; a compact adapter, checkpoints and hidden files stay out of the root.

        Raises:
            FileNotFoundError: a folder is not there any more.
        """
        if gone := [str(folder) for folder in self.folders.values() if not folder.is_dir()]:
            raise FileNotFoundError(f"{', '.join(gone)} is not there any more.")
        return [
            CommitOperationAdd("/".join(filter(None, [where, path.relative_to(folder).as_posix()])), path)
            for where, folder in self.folders.items()
            for path in sorted(folder.rglob("*"))
            if _is_own(path, folder)
            and _STAYS.isdisjoint(path.relative_to(folder).parts)
            and (where or _belongs_to_root(path.relative_to(folder)))
        ]


def _is_own(path: Path, folder: Path) -> bool:
    """Whether it is a file of a folder, not one elsewhere to which a link in the folder leads."""
    parts = [path, *(parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder)]
    return path.is_file() and not any(part.is_symlink() for part in parts)


def _belongs_to_root(path: Path) -> bool:
    return path.parts[0] != SUBMODEL and not path.parts[0].startswith((".", "checkpoint-"))


def stage_push(output_dir: str | Path, stage: int) -> Push:
    """Make the push of a finished stage: the root, `stage-N/`, and the tag `stage-N`."""
    name = f"stage-{stage}"
    folder = Path(output_dir) / name
    return Push(f"Stage {stage}", {"": folder, name: folder}, tag=name)


def finished_stages(output_dir: str | Path) -> list[int]:
    """List the finished stages of the run in `output_dir`, up to the one at the root; not what an earlier run has
    left."""
    names = [path.parent.name for path in Path(output_dir).glob(f"stage-*/{STAGE_CONFIG_NAME}")]
    found = sorted(int(name.removeprefix("stage-")) for name in names if re.fullmatch(r"stage-\d+", name))
    if not found or not (Path(output_dir) / STAGE_CONFIG_NAME).exists():
        return found
    newest = StageConfig.from_pretrained(output_dir).stage
    return [stage for stage in found if stage <= newest]


class HubPusher:
    """Pushes in order, one at a time, in a thread of its own. What fails is tried again with the next push.

    Args:
        repo_id: "user/name", or "name" for the token's owner.
        api: the client, with its token.
        private: whether a repository that is not there yet is made private.
        revision: the branch to commit to; default: main.

    Attributes:
        error: what kept the oldest of the pending pushes back the last time, or None.
    """

    def __init__(self, repo_id: str, api: HfApi, private: bool | None = None, revision: str | None = None):
        self.repo_id = repo_id
        self.api = api
        self.private = private
        self.revision = revision
        self.error: Exception | None = None
        self._ready = False
        self._pending: deque[Push] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hub")
        self._running: Future | None = None

    @property
    def pending(self) -> list[Push]:
        """What is not on the Hub yet."""
        return list(self._pending)

    def submit(self, push: Push) -> None:
        """Push beside whatever comes next. Never raises, never waits."""
        self._pending.append(push)
        self._running = self._worker.submit(self._drain)

    def catch_up(self, pushes: Sequence[Push]) -> None:
        """Push the first of the stages' pushes that the repository does not hold, and all after it, before what is
        pending, beside whatever comes next. Never raises, never waits."""
        self._running = self._worker.submit(self._catch_up, pushes)

    def _catch_up(self, pushes: Sequence[Push]) -> None:
        try:
            self.full_name()
            pushes = list(dropwhile(self.holds, pushes))
        except Exception as error:  # as in `_drain`, which tries them all
            logger.debug(f"the Hub does not say which stages it holds: {error}")
        self._pending.extendleft(reversed(pushes))
        self._drain()

    def finish(self) -> list[Push]:
        """Wait for all pushes and try once more what failed; returns what is still not on the Hub."""
        if self._running is not None:
            self._running.result()
        if self._pending:
            self._worker.submit(self._drain).result()
        return self.pending

    def full_name(self) -> str:
        """The repository with its owner, who is asked for where `repo_id` names none; as given where that fails."""
        if "/" not in (given := self.repo_id):  # which another thread may complete while the Hub is asked
            try:
                self.repo_id = f"{self.api.whoami()['name']}/{given}"
            except Exception as error:  # as in `_drain`
                logger.debug(f"the Hub does not say whose repository it is: {error}")
        return self.repo_id

    def holds(self, push: Push) -> bool:
        """Whether the tag of a stage's push has all of it as it is now, and the branch the same adapter; other files
        there, such as the card, may have been edited since."""
        files = {
            each.path_in_repo: Path(str(each.path_or_fileobj))
            for each in push.operations()
            if each.path_in_repo.startswith(f"{push.tag}/")
        }
        adapter = f"{push.tag}/{ADAPTER_WEIGHTS}"
        return self._has(files, push.tag) and self._has({adapter: files[adapter]}, self.revision)

    def _has(self, files: dict[str, Path], revision: str | None) -> bool:
        """Whether a revision has these files, by their names there."""
        try:
            found = self.api.get_paths_info(self.repo_id, list(files), revision=revision)
        except HfHubHTTPError:
            return False
        there = {each.path: each for each in found if isinstance(each, RepoFile)}
        return all(name in there and _is_the_same(path, there[name]) for name, path in files.items())

    def push(self, push: Push) -> CommitInfo:
        """Push at once.

        Raises:
            HfHubHTTPError, OSError: as `huggingface_hub` says.
        """
        self._make_ready()
        commit = self.api.create_commit(
            self.repo_id, push.operations(), commit_message=push.title, revision=self.revision
        )
        if push.tag is not None:
            self._tag(push.tag, commit.oid)
        return commit

    def _drain(self) -> None:
        while self._pending:
            try:
                self.push(self._pending[0])
            except Exception as error:  # of the network, the Hub, the token: the run goes on in any case
                self.error = error
                logger.warning(f"{self._pending[0].title} is not on the Hub yet ({_first_line(error)}).")
                return
            self._pending.popleft()
        self.error = None

    def _make_ready(self) -> None:
        if not self._ready:
            self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision is not None and not self.revision.startswith("refs/"):
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            self._ready = True

    def _tag(self, tag: str, oid: str) -> None:
        try:
            self.api.create_tag(self.repo_id, tag=tag, revision=oid)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            self.api.delete_tag(self.repo_id, tag=tag)  # of an earlier run, or of this one before it was resumed
            self.api.create_tag(self.repo_id, tag=tag, revision=oid)


def _is_the_same(path: Path, there: RepoFile) -> bool:
    if there.lfs is not None:
        return there.lfs.sha256 == sha256(path)
    return there.blob_id == git_hash(path.read_bytes())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"


def left_over(pusher: HubPusher, output_dir: str | Path) -> str:
    """Say what could not be pushed, and by which command it can be."""
    titles = ", ".join(push.title for push in pusher.pending)
    command = [str(output_dir), pusher.repo_id]
    command += ["--private"] if pusher.private else []
    command += ["--revision", pusher.revision] if pusher.revision else []
    return (
        f"Not on the Hub: {titles} ({_first_line(pusher.error)}). Nothing is lost, all of it is in {output_dir}/. "
        f"Push it with: devft push {shlex.join(command)}"
    )


def push_stages(pusher: HubPusher, output_dir: str | Path) -> list[CommitInfo]:
    """Push at once the first stage of `output_dir` that the repository does not hold yet, and all after it, so that
    the last one is at the root."""
    pusher.full_name()
    pushes = [stage_push(output_dir, stage) for stage in finished_stages(output_dir)]
    return [pusher.push(push) for push in dropwhile(pusher.holds, pushes)]


def push_run(output_dir: str, repo_id: str, revision: str | None, private: bool | None) -> None:
    """Push the stages of a run that the Hub does not hold yet, and print their commits.

    Raises:
        ValueError: there is no finished stage.
        ConnectionError: the Hub cannot be reached.
    """
    if not finished_stages(output_dir):
        raise ValueError(f"{output_dir} holds no finished stage of a run.")
    try:
        commits = push_stages(HubPusher(repo_id, HfApi(), private, revision), output_dir)
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise ConnectionError(f"the Hub cannot be reached ({error}): nothing is lost, push again later.") from error
    print(*([commit.commit_url for commit in commits] or ["Everything is on the Hub already."]), sep="\n")
