"""Writes router.txt and worker.txt: the versions in this environment, so that images run what the tests ran.

    python deploy/requirements/lock.py

Knows the environment it runs in and what packlight requires. Resolves nothing and asks no registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parent
# A router reads models as workers do, GGUF files too.
IMAGES = {"router": ("packlight[traces]", "gguf"), "worker": ("packlight[engine,traces]",)}


def main() -> None:
    for image, roots in IMAGES.items():
        lines = [f"# What the {image} images install. Written by deploy/requirements/lock.py.", *pins(roots)]
        (FOLDER / f"{image}.txt").write_text("\n".join(lines) + "\n")


def pins(roots: tuple[str, ...]) -> list[str]:
    """`name==version` of everything that `roots` need, themselves included, packlight not; sorted.

    Raises PackageNotFoundError for what is needed and not installed."""
    found: dict[str, str] = {}
    for root in roots:
        _visit(Requirement(root), found, set())
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != "packlight"]


def _visit(requirement: Requirement, found: dict[str, str], seen: set[str]) -> None:
    name = canonicalize_name(requirement.name)
    # Of torch there is one build per kind of machine; which, is the image's to say.
    found[name] = distribution(name).version.partition("+")[0]
    for extra in ("", *requirement.extras):
        if f"{name}[{extra}]" not in seen:
            seen.add(f"{name}[{extra}]")
            for needed in _needed(name, extra):
                _visit(needed, found, seen)


def _needed(name: str, extra: str) -> Iterator[Requirement]:
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            distribution(requirement.name)
        except PackageNotFoundError:
            if not requirement.name.startswith(("nvidia-", "cuda-", "triton")):  # torch pins these itself
                raise
            continue
        yield requirement


if __name__ == "__main__":
    main()
