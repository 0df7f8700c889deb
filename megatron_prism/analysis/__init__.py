"""What changed between models: weights, spectra, representations, the path between them, responses. Each figure beside the null that it must beat."""
