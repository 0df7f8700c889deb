"""A study: a graph of stages, what is kept of each, the sums of what each was given, and the claims judged on what they gave."""
