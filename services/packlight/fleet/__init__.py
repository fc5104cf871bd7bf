"""Who is alive, in which role, and how loaded."""
