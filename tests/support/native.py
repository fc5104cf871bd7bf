"""The compiled kernels as tests use them: every form that this CPU runs, and sanitized where the run asks for it."""

import os

from packlight.native.library import open_library
from packlight.native.variants import cpu_flags, supported

# `make sanitize` sets the variable, and preloads what a sanitized library needs. The best form and the plainest have
# every line between them.
SANITIZED = "PACKLIGHT_SANITIZE" in os.environ
EVERY_VARIANT = supported(cpu_flags())
VARIANTS = (EVERY_VARIANT[0], EVERY_VARIANT[-1]) if SANITIZED else EVERY_VARIANT


def open_variant(variant):
    return open_library(variant, sanitize=SANITIZED)
