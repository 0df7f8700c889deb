"""Contained code: run a Python program that nobody has read, so that it reaches nothing. `choose.choose()` returns the Sandbox; or it refuses."""
