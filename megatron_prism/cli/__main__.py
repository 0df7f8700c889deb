"""`python -m megatron_prism.cli` is the same as `prism`. The ranks of a gang are started this way."""

from megatron_prism.cli import main

if __name__ == "__main__":
    main()
