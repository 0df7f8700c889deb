"""From an architecture and a rank grid to a Megatron-Core model."""
