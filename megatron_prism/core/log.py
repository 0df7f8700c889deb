"""Logging to standard error, once a gang: rank 0 speaks, the others only warn."""

from __future__ import annotations

import logging
import os
import sys

NAME = "prism"


def get() -> logging.Logger:
    """Return the project's logger."""
    return logging.getLogger(NAME)


def setup() -> None:
    """Send the project's log to standard error; ranks above 0 of a gang speak from WARNING up."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = get()
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
