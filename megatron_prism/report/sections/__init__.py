"""The sections of a report: a file each, a pure function from what was read (material.py) and the paper's tables to a Section."""
