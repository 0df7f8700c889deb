"""Arithmetic about a run before it runs: FLOPs, memory, throughput. No torch."""
