"""What changed between models: weights, spectra, representations. Each figure stands beside the null that it must beat."""
