"""The compiled kernels as tests use them: every form that this CPU runs, and sanitized where the run asks for it."""

import os

from packlight.native.library import open_library
from packlight.native.variants import cpu_flags, supported

VARIANTS = supported(cpu_flags())


def open_variant(variant):
    """`make sanitize` sets the variable, and preloads what a sanitized library needs."""
    return open_library(variant, sanitize="PACKLIGHT_SANITIZE" in os.environ)
