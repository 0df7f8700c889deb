"""Hugging Face folders at the level of bytes: read and write safetensors, cast values as bits, find NaN and inf."""
