"""Inverters: one published method per file."""
