"""A federation over a network: the clients of a run on their owners' machines, on Flower's deployment engine."""
