"""Generate text: an engine takes prompts and returns rollouts (engine.py). cached.py is the embedded engine."""
