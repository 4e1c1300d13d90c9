"""Attention hooks and controls."""
