"""Scorers: one published idea of what matters per file."""
