"""`prism JOB ...`: parse, load, check, call the job. One file per group of jobs; entry.py combines them and ends the process."""

import sys
import traceback

FAULT = 4  # EnvironmentFault's, which could not be imported
INTERRUPTED = 130  # of a shell, for SIGINT


def main() -> None:
    """Run the command line. Where its modules cannot be read, the machine is at fault: Python's own code of an error, 1, is a result's failure."""
    try:
        from megatron_prism.cli import entry
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception:
        traceback.print_exc()
        sys.stderr.write("prism: the command line cannot be imported: a file system that fails, or an installation that is not whole\n")
        sys.exit(FAULT)
    entry.main()
