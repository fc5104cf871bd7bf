"""The compiled CPU kernels: sources, how they are built, and the one C interface to them."""
