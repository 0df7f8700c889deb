"""Checks between the keys of a config: pure functions that return every problem, before anything starts."""
