"""Solvers: one step rule per file, valid in both directions."""
