"""Measuring edits: benchmark sets, metrics, and the statistics of their comparison."""
