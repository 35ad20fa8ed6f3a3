"""Kill what a federation's SuperLink has started for its runs."""

from contextlib import suppress

import psutil

from hf_devft.network.local import LocalFederation


def kill_server_apps(federation: LocalFederation) -> None:
    """Kill the apps of all runs under way; the SuperLink and the nodes stay."""
    for each in psutil.Process(federation.processes["superlink"].pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended by itself, or is a zombie, which is a kind of it
            if "flwr-serverapp" in " ".join(each.cmdline()):
                each.kill()
