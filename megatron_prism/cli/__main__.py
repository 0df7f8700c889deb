"""`python -m megatron_prism.cli`: the same as `prism`; the ranks of a gang are started so."""

from megatron_prism.cli.entry import main

if __name__ == "__main__":
    main()
