"""Ahead-of-time compilation for TPU slices: bytes, operations and traffic of a train step, without TPUs."""
