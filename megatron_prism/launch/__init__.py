"""From a job to a place where it runs: Slurm."""
