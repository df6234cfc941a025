"""One protocol for a comparison: the learning rate chosen on development seeds, then several seeds, then one table."""
