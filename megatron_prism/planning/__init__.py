"""Layer 2: arithmetic about a run before it runs: FLOPs, memory, throughput. No torch."""
