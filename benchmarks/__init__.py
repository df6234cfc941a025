"""Measurements; every number in the docs names the command here that produced it."""
