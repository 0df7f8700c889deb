"""Layer 2: an architecture and a rank grid become a Megatron-Core model."""
