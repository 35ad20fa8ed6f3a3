"""How long to wait before Flower is asked again."""

# A part of the time that one has waited, within these seconds: short rounds lose little, and who waits for long is no
# load (our choice).
PATIENCE, SHORTEST, LONGEST = 0.02, 0.02, 3.0


def pause(waited: float) -> float:
    """Return the seconds until the next question, after this many without an answer."""
    return min(max(PATIENCE * waited, SHORTEST), LONGEST)
