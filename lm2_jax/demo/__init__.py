"""`make demo`: a small model reads a long text once, keeps its memory in files, and answers from them.

The models are in this folder, `lm2/` with a memory and `none/` without one; docs/inspect.md has the commands that
trained them.
"""
