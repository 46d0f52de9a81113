"""Optimizers that read one table of parameters, and the schedule."""
