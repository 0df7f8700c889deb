"""Layer 5: one straight-line file a job."""
