"""Evaluation: tasks as questions, their responses, scores, and the verdict on two evaluations."""
