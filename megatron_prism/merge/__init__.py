"""Models of one architecture merged into one Hugging Face folder, a piece of a tensor at a time."""
