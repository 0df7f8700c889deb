"""Two evaluations, question by question: what changed, how sure it is, and what a policy says of it."""
