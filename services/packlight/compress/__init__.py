"""Packing: scorer x budget x reader x codec, and the recipe table."""
