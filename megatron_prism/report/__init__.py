"""Layer 4: results as a reader sees them: figures and pages. Plain data in, files out."""
