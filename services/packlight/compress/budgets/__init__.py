"""Budgets: one rule of dividing tokens among layers and heads per file."""
