"""A base, its layers, and an adapter on it. Knows neither stages nor rounds."""
