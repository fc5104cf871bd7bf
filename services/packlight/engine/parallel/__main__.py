"""How a follower is started: `python -m packlight.engine.parallel`, with the first process at its standard input."""

from packlight.engine.parallel.follower import main

raise SystemExit(main())
