"""Tool calls: how a model is told of functions, and how its calls are held to them and read."""
