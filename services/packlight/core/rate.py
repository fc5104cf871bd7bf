"""Speeds that workers measure of themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Rate:
    """Units per second over a fading past: what was added `half_life_s` measured seconds ago counts half.

    Sums fade, not ratios, so a step of one token does not weigh as much as a step of a thousand."""

    half_life_s: float = 10.0
    amount: float = 0.0
    elapsed_s: float = 0.0

    def add(self, amount: float, elapsed_s: float) -> None:
        fade = 0.5 ** (elapsed_s / self.half_life_s)
        self.amount = self.amount * fade + amount
        self.elapsed_s = self.elapsed_s * fade + elapsed_s

    @property
    def per_s(self) -> float:
        """0 while nothing was measured."""
        return self.amount / self.elapsed_s if self.elapsed_s > 0 else 0.0
