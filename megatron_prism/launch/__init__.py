"""Run a job on a cluster: Slurm."""
