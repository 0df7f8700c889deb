"""Weights at rest. Hugging Face folders, Megatron torch_dist checkpoints, and the way between them."""
