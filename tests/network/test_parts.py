"""How soon a part of a message is asked for again."""

import time

from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.superlink.grid import http_grid

from hf_devft.network.parts import pull_parts, pull_replies_soon


def test_a_part_on_its_way_is_asked_for_again_within_a_second():
    asked = []

    def fetch(part: str) -> bytes:
        asked.append(time.monotonic())
        if len(asked) < 3:
            raise ObjectUnavailableError(part)
        return b"whole"

    assert pull_parts(["part"], pull_object_fn=fetch) == {"part": b"whole"}
    assert len(asked) == 3
    assert pull_parts.keywords["initial_backoff"] < 0.1, "Flower waits a second"


def test_flowers_grid_fetches_replies_so(monkeypatch):
    monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)  # to have it back
    pull_replies_soon()
    assert http_grid.HttpGrid.pull_messages.__globals__["pull_objects"] is pull_parts
