"""Adapters: one model family per file."""
