"""Configuration, errors, logging and manifests; no torch at import."""
