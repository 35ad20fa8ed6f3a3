"""A whole federation on this machine: a SuperLink and nodes with TLS and authentication, a process each."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hf_devft.network.certificates import make_node_key, make_server_certificate


APP = "local"  # name of the connection in Flower's config


@dataclass
class LocalFederation:
    """The processes of a federation on loopback, and the folder of all that they write.

    Attributes:
        folder: has `certificates/`, Flower's own `flower/`, and a log of each process.
        port: of the SuperLink.
        keeps_messages: whether the SuperLink has a database, `superlink.db`, in place of its memory.
        processes: by name; "superlink" and the nodes.
    """

    folder: Path
    port: int = 0
    keeps_messages: bool = False
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __post_init__(self):
        self.folder = self.folder.absolute()
        self.port = self.port or _free_port()

    @property
    def address(self) -> str:
        """Of the SuperLink."""
        return f"127.0.0.1:{self.port}"

    @property
    def authority(self) -> Path:
        """The certificate by which nodes know the SuperLink."""
        return self.folder / "certificates" / "ca.crt"

    @property
    def environment(self) -> dict[str, str]:
        """Of all processes: Flower's files in the folder, no telemetry, this environment's programs; a thread each,
        unless `OMP_NUM_THREADS` says otherwise, as they share the machine's cores."""
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"FLWR_HOME": str(self.folder / "flower"), "FLWR_TELEMETRY_ENABLED": "0", "PATH": programs}
        return {"OMP_NUM_THREADS": "1"} | os.environ | own

    def log(self, name: str) -> str:
        """Return what a process has written."""
        return (self.folder / f"{name}.log").read_text()

    def start_superlink(self) -> None:
        """Start the SuperLink, with a certificate authority of its own; returns when it answers."""
        certificates, flower = self.folder / "certificates", self.folder / "flower"
        if not (certificates / "server.crt").exists():
            make_server_certificate(certificates, ["127.0.0.1", "localhost"])
        flower.mkdir(parents=True, exist_ok=True)
        connection = {"address": self.address, "root-certificates": str(certificates / "ca.crt")}
        lines = [f"[superlink.{APP}]", *(f'{key} = "{value}"' for key, value in connection.items())]
        (flower / "config.toml").write_text("\n".join(["[superlink]", f'default = "{APP}"', *lines]) + "\n")
        files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
        flags = [part for name, file in files.items() for part in (f"--ssl-{name}", str(certificates / file))]
        self.start(
            "superlink",
            [program("flower-superlink"), *flags, "--port", str(self.port)]
            + ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
            + (["--database", str(self.folder / "superlink.db")] if self.keeps_messages else []),
        )
        self._wait(lambda: _answers(self.port), "superlink", 60)

    def start_node(self, name: str, flags: Sequence[str], known: bool = True) -> None:
        """Start a node, with a key of its own.

        Args:
            flags: as for `hf_devft.network.node`, beside its name and connection.
            known: whether the SuperLink is told of its key.
        """
        key = self.make_key(name, known)
        connection = ["--superlink", self.address, "--root_certificates", str(self.authority)]
        command = [sys.executable, "-m", "hf_devft.network.node", "--name", name, "--private_key", str(key)]
        self.start(name, [*command, *connection, *flags])

    def make_key(self, name: str, known: bool = True) -> Path:
        """Make a node's key, unless it is there, and tell the SuperLink of it; returns its path."""
        key = self.authority.with_name(f"{name}.key")
        if not key.exists():
            make_node_key(key.parent, name)
            if known:
                self.flower("supernode", "register", f"{key}.pub", APP)
        return key

    def flower(self, *command: str) -> str:
        """Run Flower's command line; returns what it says.

        Raises:
            RuntimeError: it fails.
        """
        done = subprocess.run(
            [program("flwr"), *command], capture_output=True, text=True, env=self.environment, check=False
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def run(self, app: Path, options: Mapping[str, str | int | float]) -> subprocess.Popen:
        """Start a run; what its server writes comes from the returned process, which ends with it.

        Args:
            app: folder of a Flower app. options: of its run config.
        """
        config = " ".join(
            f"{key}={value}" if not isinstance(value, str) else f"{key}='{value}'" for key, value in options.items()
        )
        return subprocess.Popen(
            [program("flwr"), "run", str(app), APP, "--stream", "--run-config", config],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment,
        )  # fmt: skip

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a process, with all that it has started."""
        process = self.processes.pop(name)
        try:
            os.killpg(process.pid, how)
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        except ProcessLookupError:
            process.wait()

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process, which writes to the log of its name."""
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def _wait(self, ready, name: str, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not ready():
            if self.processes[name].poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{name} has not started:\n{self.log(name)[-2000:]}")
            time.sleep(0.1)


@contextmanager
def local_federation(folder: Path, keeps_messages: bool = False) -> Iterator[LocalFederation]:
    """Start a SuperLink in a new folder, in which what an earlier one has left is deleted; ends it and every node of
    the federation at the end of the block, and where this process is told to end (SIGTERM).

    Args:
        keeps_messages: see `LocalFederation`.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "superlink.log").exists():
        raise ValueError(f"{folder} holds something else than a federation's files: choose another, or empty it.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    federation = LocalFederation(folder, keeps_messages=keeps_messages)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        federation.start_superlink()
        yield federation
    finally:
        for name in list(federation.processes):
            federation.stop(name)
        signal.signal(signal.SIGTERM, before)


def program(name: str) -> str:
    """Return the path of a program of this environment."""
    return str(Path(sys.executable).with_name(name))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _answers(port: int) -> bool:
    with socket.socket() as trial:
        trial.settimeout(1)
        return trial.connect_ex(("127.0.0.1", port)) == 0
