"""The parts of Flower's messages, which are asked for again soon where they are still on their way."""

from functools import partial

from flwr.supercore.inflatable.inflatable_utils import pull_objects


# (identifiers, what fetches one) -> their contents. A part that is not there is asked for again after 50 ms, later
# after up to a second (our choice: a part is some ten milliseconds on its way).
pull_parts = partial(pull_objects, initial_backoff=0.05, backoff_cap=1.0)


def pull_replies_soon() -> None:
    """Have Flower's grid fetch the parts of replies so. It waits for a second at first, which is more than many rounds
    take, and no option says otherwise (flwr 1.41)."""
    from flwr.superlink.grid import http_grid  # here, as it takes long to import, and nodes have no grid

    http_grid.pull_objects = pull_parts
