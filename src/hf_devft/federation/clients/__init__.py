"""A client's local training: one after another, or several clients in a batch."""
