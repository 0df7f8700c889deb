"""Hugging Face folders at the level of bytes: safetensors in and out, values as bits, NaN and inf found."""
