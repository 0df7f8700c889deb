"""Model families as data: how a config.json is read and written, and which tensor goes where."""
