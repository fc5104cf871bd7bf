"""What `helm test` runs: waits until the release can serve, then asks it for a streamed answer."""

import json
import os
import time
import urllib.error
import urllib.request

URL, DEADLINE_S = os.environ["PACKLIGHT_URL"], 600.0
LINES = [line.strip() for line in os.environ.get("PACKLIGHT_API_KEYS", "").splitlines()]
KEYS = [line for line in LINES if line and not line.startswith("#")]


def wait_until_ready() -> str:
    """The name of the model."""
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(f"{URL}/health/ready", timeout=5) as reply:
                return str(json.load(reply)["model"])
        except OSError as error:
            said = error.read().decode() if isinstance(error, urllib.error.HTTPError) else str(error)
            print(f"not ready: {said}", flush=True)
            if time.monotonic() > end:
                raise SystemExit(f"not ready after {DEADLINE_S:.0f} s: {said}") from None
            time.sleep(2)


def ask(model: str) -> list[str]:
    """The `data:` lines of a short streamed answer."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": model, "messages": question, "max_tokens": 16, "stream": True}
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {KEYS[0]}"} if KEYS else {})
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        lines = [line.decode().strip() for line in reply]
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


events = ask(wait_until_ready())
if not events or events[-1] != "[DONE]" or any("error" in json.loads(event) for event in events[:-1]):
    raise SystemExit(f"no whole answer: {events}")
print("".join(choice["delta"].get("content") or "" for event in events[:-1] for choice in json.loads(event)["choices"]))
