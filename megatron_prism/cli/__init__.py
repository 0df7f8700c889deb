"""`prism JOB ...`: parse, load, check, call the job. One file per group of jobs; entry.py combines them and ends the process."""

from megatron_prism.cli.entry import app, main

__all__ = ["app", "main"]
