"""The fleet-wide prefix index: who holds how much of a prompt."""
