"""lm-eval's tasks on our model: retention of what the base model knew, and the Open LLM Leaderboards."""
