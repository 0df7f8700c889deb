"""Reinforcement learning on verifiable rewards: GRPO on Megatron-Core, and NeMo-Aligner as another backend."""
