"""What a worker process says of itself over HTTP: whether it has started, lives and is ready, and its metrics.

Knows a port and a `Health`, which the process keeps up to date. Served from a thread of its own, from before the model
is read: weights take minutes, and whoever waits for them should see that. Does not know what the worker computes.

`/health/startup` is 200 once the worker listens, `/health/live` while its event loop goes round, `/health/ready` while
requests can reach it: it listens, the fleet's registry has heard of it, and it is not draining. Each answers with the
same object, which says why.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from enum import StrEnum
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from packlight import __version__
from packlight.core.config import WorkerSection
from packlight.core.errors import StartupError
from packlight.core.workers import Role

STUCK_S = 30.0
"""An event loop that has not gone round for this long, many heartbeats, is stuck."""


class Phase(StrEnum):
    LOADING = "loading the model"
    SERVING = "serving"
    DRAINING = "draining"


class Health:
    """The state of one worker process. Its event loop writes, the HTTP thread reads: every field is a single value."""

    def __init__(self, role: Role, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._role, self._clock = role, clock
        self._phase, self._pulse_at = Phase.LOADING, clock()
        self._is_listed: Callable[[], bool] = lambda: False

    def serving(self, is_listed: Callable[[], bool]) -> None:
        """The worker listens. `is_listed` tells whether the fleet's registry is there; asked from any thread."""
        self._is_listed = is_listed
        self.pulse()
        self._phase = Phase.SERVING

    def draining(self) -> None:
        self._phase = Phase.DRAINING

    def pulse(self) -> None:
        """The event loop goes round."""
        self._pulse_at = self._clock()

    @property
    def started(self) -> bool:
        return self._phase is not Phase.LOADING

    @property
    def live(self) -> bool:
        return not self.started or self._clock() - self._pulse_at < STUCK_S

    @property
    def ready(self) -> bool:
        return self.why_not is None

    @property
    def why_not(self) -> str | None:
        """Why the worker is not ready; None if it is."""
        if self._phase is not Phase.SERVING:
            return self._phase.value
        if not self.live:
            return f"its event loop has been stuck for {self._clock() - self._pulse_at:.0f} s"
        return None if self._is_listed() else "the fleet registry is away: is REDIS_URL right, and Redis up?"

    def describe(self) -> dict[str, Any]:
        return {
            "role": self._role.value,
            "phase": self._phase.value,
            "live": self.live,
            "ready": self.ready,
            "why_not": self.why_not,
            "version": __version__,
        }


class HealthServer:
    """Serves `health` and the metrics of `registry` while the context lasts, or nothing if `metrics_port` is unset."""

    def __init__(self, role: Role, section: WorkerSection) -> None:
        """Raises StartupError if the port cannot be had."""
        self.health, self.registry = Health(role), CollectorRegistry()
        self._server = None if section.metrics_port is None else _listen(role, section, self._app())

    @property
    def url(self) -> str | None:
        if self._server is None:
            return None
        host, port = self._server.server_name, self._server.server_port
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def __enter__(self) -> HealthServer:
        if self._server is not None:
            threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _app(self) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
        metrics = make_wsgi_app(self.registry)
        answers: dict[str, Callable[[], bool]] = {
            "/health/startup": lambda: self.health.started,
            "/health/live": lambda: self.health.live,
            "/health/ready": lambda: self.health.ready,
            "/health": lambda: self.health.ready,
        }

        def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            is_well = answers.get(environ["PATH_INFO"])
            if is_well is None:
                return metrics(environ, start)  # type: ignore[no-any-return]
            start("200 OK" if is_well() else "503 Service Unavailable", [("Content-Type", "application/json")])
            return [json.dumps(self.health.describe()).encode()]

        return app


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without the look-up of the own name that `HTTPServer` does: it waits for a name server."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Probes come every second."""


def _listen(role: Role, section: WorkerSection, app: Any) -> WSGIServer:
    host, port = section.host, section.metrics_port
    kind = _ServerV6 if ":" in host else _Server
    try:
        return make_server(host, port or 0, app, server_class=kind, handler_class=_Silent)
    except OSError as error:
        raise StartupError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}. Choose another --set {role}.metrics_port=..."
        ) from None
