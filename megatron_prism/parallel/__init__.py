"""Layer 1: the machine and its ranks. A CPU stands in for CUDA, one rank grid, one place for version differences."""
