"""Measuring: the parts of Packlight, and whole servers side by side. A composition root; nothing imports it."""
