"""Triton's kernels without a GPU: its interpreter runs them where the environment asked for it before the import."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "tests/unit/attention/test_page_kernels.py",
    "tests/unit/attention/test_products_kernel.py",
    "tests/unit/compress/test_window_kernel.py",
    "tests/unit/models/test_layer_kernels.py",
)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install --no-deps triton==3.9.0")
def test_the_kernels_do_what_their_twins_in_torch_do():
    """In one process: what it imports takes longer than many of the tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
