"""Layer 1: what a model family is, as data: how its config.json reads, and which tensor goes where."""
