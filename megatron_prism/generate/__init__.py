"""Text from a model: an engine takes prompts and returns rollouts (engine.py); cached.py is the first."""
