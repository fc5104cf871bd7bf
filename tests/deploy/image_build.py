"""The steps of a Dockerfile target, run on this machine in a folder that stands for the image's root.

No container engine is needed, so CI can check that the commands do what they should. All stages share one root, in
which absolute paths of the instructions are placed; base images are whatever this machine is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from deploy.chart import ROOT
from tests.deploy.support import Stage, expand, flags, lineage, stages

OWN_PATHS = re.compile(
    r"(?<![\w./:-])/(?=(opt|src|wheels|requirements\.txt|smollm2|var/cache|usr/local/bin/healthcheck)\b)"
)


class Image:
    """`build` makes it, `run` starts a command in its environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shims = root / "shims"
        shims.mkdir()
        (shims / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (shims / "python").chmod(0o755)
        kept = ("PIP_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")  # how this machine reaches its registry
        self._base = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        self._base |= {"PATH": f"{shims}:/usr/bin:/bin", "HOME": os.environ["HOME"]}
        self.environ = dict(self._base)
        self._built: set[str] = set()

    def build(self, target: str) -> None:
        """Run every stage that `target` needs, in order. Raises AssertionError with the output of a step that fails."""
        self.environ = dict(self._base)
        for stage in lineage(target):
            self._build_stage(stage)

    def run(self, *command: str, **options: object) -> subprocess.CompletedProcess[str]:
        environ = self.environ | {"HOME": self.placed("/var/cache/packlight")}
        path = shutil.which(command[0], path=environ["PATH"])
        assert path is not None, f"{command[0]} is not in the image"
        return subprocess.run([path, *command[1:]], capture_output=True, text=True, env=environ, **options)  # type: ignore[call-overload, no-any-return]

    def placed(self, text: str) -> str:
        return OWN_PATHS.sub(f"{self.root}/", text)

    def _build_stage(self, stage: Stage) -> None:
        is_new = stage.name not in self._built
        self._built.add(stage.name)
        for word, text in stage.instructions:
            if word == "ENV":
                self._set(text)
            elif word == "ARG":
                self._set(text if "=" in text else f"{text}=")
            elif word == "COPY" and is_new:
                self._copy(text)
            elif word == "RUN" and is_new:
                self._run_step(text)

    def _set(self, text: str) -> None:
        for name, value in re.findall(r"(\w+)=(\"[^\"]*\"|\S*)", text):
            # The home folder of the image is not writable here before it is made, and holds pip's cache until then.
            if name != "HOME":
                self.environ[name] = self.placed(expand(value.strip('"'), self.environ))

    def _copy(self, text: str) -> None:
        named, (*sources, target) = flags(text)
        if "from" in named:
            before = dict(self.environ)
            for stage in lineage(named["from"]):
                self._build_stage(stage)
            self.environ = before
        for source in sources:
            origin = Path(self.placed(source)) if "from" in named else ROOT / source
            place = Path(self.placed(target))
            assert origin.exists(), f"COPY {text}: there is no {source}"
            if origin.is_dir():
                if origin != place:
                    shutil.copytree(origin, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place = place / origin.name if target.endswith("/") else place
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(origin, place)
                place.chmod(int(named.get("chmod", "0644"), 8))

    def _run_step(self, text: str) -> None:
        command = re.sub(r"--mount=\S+ ", "", text).strip()
        if os.geteuid() != 0:
            command = command.replace("-o 10001 -g 10001", "")
        done = subprocess.run(
            ["sh", "-ec", self.placed(command)], capture_output=True, text=True, env=self.environ, cwd=self.root
        )
        assert done.returncode == 0, f"RUN {command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def context_files() -> list[str]:
    """What instructions copy from the repository."""
    return [source for stage in stages().values() for word, text in stage.instructions if word == "COPY"
            for named, words in [flags(text)] if "from" not in named for source in words[:-1]]  # fmt: skip
