"""One straight-line file per job."""
