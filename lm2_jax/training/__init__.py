"""Training: the optimizer, one step, the loop (`fit.fit`), and what is written down about it."""
