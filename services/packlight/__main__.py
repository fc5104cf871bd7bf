"""`python -m packlight`."""

import sys

from packlight.cli import main

sys.exit(main())
