"""PRISM (arXiv 2603.17074) on Megatron-Core: mid-train a Hugging Face base model and write it back."""

__version__ = "0.1.0"
