"""Editors: one published method per file."""
