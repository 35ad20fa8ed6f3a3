"""Clients that differ in speed, in the times at which they are there, in memory and in data: what few runs use."""
