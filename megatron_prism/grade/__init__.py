"""Grading responses: the one grader of reinforcement learning and evaluation."""
