"""NeMo-Aligner 0.7.0 as an RL backend: what it is started with, and the reward server that it asks."""
