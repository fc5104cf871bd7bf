"""PyramidKV (arXiv 2406.02069, section 3.3): budgets that fall linearly from the first layer to the last.

Twice: in integers as the authors' program computes it, and in real numbers as kvpress does.
"""

from __future__ import annotations


def official(num_tokens: int, capacity: int, window: int, num_layers: int, beta: int) -> list[int]:
    """Tokens of each layer, the window included, for a mean of `capacity`."""
    if num_tokens < capacity:
        return [num_tokens] * num_layers
    base = capacity - window
    if num_tokens < 2 * base or num_layers == 1:
        return [base + window] * num_layers
    least = base // beta
    most = 2 * base - least
    if most >= num_tokens - window:
        most = num_tokens - window
        least = 2 * base - most
    step = (most - least) // (num_layers - 1)
    return [most - layer * step + window for layer in range(num_layers)]


def kvpress(num_tokens: int, ratio: float, window: int, num_layers: int, beta: int) -> list[int]:
    """kvpress 0.5.5: `ratio` is the share dropped. Here the mean *is* the budget, window included, and the window does
    not come on top; a taper whose least layer is narrower than the window is given up for a uniform budget."""
    mean = num_tokens * (1 - ratio)
    least = mean / beta
    most = 2 * mean - least
    if most >= num_tokens - window:
        most = num_tokens - window
        least = 2 * mean - most
    if not num_tokens >= most >= least >= window:
        return [max(1, round(mean))] * num_layers
    return [round(most - layer * (most - least) / (num_layers - 1)) for layer in range(num_layers)]
