"""Attention over pages: the backend seam and its implementations."""
