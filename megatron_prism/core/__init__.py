"""Layer 0: configuration, errors, logging and manifests; no torch at import."""
