#!/usr/bin/env python3
"""Whether the process in this container is well: says what it answers at PACKLIGHT_HEALTH_URL, fails if that is an
error. Of metrics, which are long, it says nothing."""

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0


def main() -> int:
    url = os.environ["PACKLIGHT_HEALTH_URL"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # our own process: past any proxy
    try:
        with opener.open(url, timeout=TIMEOUT_S) as reply:
            text, is_well = reply.read().decode(), True
    except urllib.error.HTTPError as error:
        text, is_well = error.read().decode(), False
    except OSError as error:
        text, is_well = f"{url}: {error}", False
    print("ok" if is_well and url.endswith("/metrics") else text)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
