"""Layer 2: sources to tokens, tokens to a weighted mixture, a mixture to batches."""
