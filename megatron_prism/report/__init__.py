"""Results for a reader: figures and pages. Plain data in, files out."""
