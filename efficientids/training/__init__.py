"""Optimiser, the step, the loop over phases."""
