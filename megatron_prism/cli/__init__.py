"""`prism JOB ...`: parse, load, check, call the job. Nothing else. A file a group of jobs; entry.py puts them together and ends the process."""

from megatron_prism.cli.entry import app, main

__all__ = ["app", "main"]
