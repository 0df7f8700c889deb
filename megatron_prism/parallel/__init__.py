"""The machine and its ranks: a CPU in place of CUDA, the rank grid, and one place for version differences."""
