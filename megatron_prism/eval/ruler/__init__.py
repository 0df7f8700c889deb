"""RULER: 13 sub-tasks of synthetic long-context questions, of a length that the model's own tokenizer counts. Made here, from a seed."""
