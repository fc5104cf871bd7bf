"""What of a JSON schema can be followed without harm: how deep and wide it is, how long its patterns and numbers are.

llguidance compiles a schema by recursion on the stack of its caller. A chain of a thousand references uses up the 8 MiB
that a thread has, and so does a range of integers at the lower end of 64 bits: the process is gone, and with it
everybody's answers. A pattern of tens of thousands of characters takes minutes, and multiples of a million take hours,
in which no other answer of that worker gets on. So all of them are looked at before. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from math import lcm
from typing import Any
from urllib.parse import unquote

from packlight.core.errors import InvalidRequest

# A level takes 5 KiB of the stack at most, measured with llguidance 1.9: half of 8 MiB.
MAX_LEVELS = 800
MAX_PATTERN_CHARS = 4096
# Remainders are followed one by one: ten thousand of them take a fifth of a second, once.
MAX_MULTIPLE = 10_000
# Whatever may be left out takes a rule for each that may come next: a quarter of a second for these, once.
MAX_PROPERTIES = 1000
# llguidance reads bounds as doubles, and rounds those near -2**63 down to it.
_ABOVE, _BELOW = -(2**63) + 1024, 2**64


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises InvalidRequest, with the reason, for a schema that is not to be compiled."""
    depths: dict[int, int] = {}
    deepest = _depth(schema, depths)
    references, divisors = set[str](), set[float]()
    for key, value in _entries(schema):
        _check_entry(key, value)
        if key == "$ref" and isinstance(value, str):
            references.add(value)
        if key == "multipleOf" and isinstance(value, int | float):
            divisors.add(value)
    _check_divisors(divisors)
    # Each is followed once, wherever it is met first. What cannot be found from here is somewhere within the schema.
    targets = (_target(schema, reference) for reference in references)
    num_levels = deepest + sum(depths.get(id(target), deepest) for target in targets)
    if num_levels > MAX_LEVELS:
        raise InvalidRequest(f"its references may lead {num_levels} levels deep, the limit is {MAX_LEVELS}")


def _depth(value: Any, depths: dict[int, int]) -> int:
    """How many objects and arrays lie within each other; that of each is noted in `depths`, by its id."""
    if not isinstance(value, dict | list):
        return 0
    children = value.values() if isinstance(value, dict) else value
    depths[id(value)] = depth = 1 + max((_depth(child, depths) for child in children), default=0)
    return depth


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything within `value`, with the key that it, or the array around it, has."""
    yield key, value
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _entries(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from _entries(child, key)


def _check_entry(key: str, value: Any) -> None:
    match value:
        case bool():
            return
        case int() | float():
            if value < _ABOVE or (isinstance(value, int) and value >= _BELOW):
                raise InvalidRequest("it has a number beyond the integers of 64 bits: expected -2^63 < number < 2^64")
        case str():
            _check_pattern(value if key == "pattern" else "")
        case dict() if key == "properties" and len(value) > MAX_PROPERTIES:
            raise InvalidRequest(f"it has an object of {len(value)} properties, the limit is {MAX_PROPERTIES}")
        case dict() if key == "patternProperties":
            for pattern in value:
                _check_pattern(pattern)


def _check_pattern(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise InvalidRequest(f"it has a pattern of {len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}")


def _check_divisors(divisors: Iterable[float]) -> None:
    """Wherever they stand: what is wanted of one number may be said in several places. They are counted in the last
    decimal place that one of them has, as the compiler does."""
    places = max((-min(_exponent(divisor), 0) for divisor in divisors), default=0)
    common = 1
    for divisor in divisors:
        common = lcm(common, int(Fraction(str(divisor)) * 10**places))
        if common > MAX_MULTIPLE:
            unit = f", counted in units of 1e-{places}" if places else ""
            raise InvalidRequest(
                f"the numbers of its 'multipleOf' have the common multiple {_shortly(common)}{unit}, the limit is "
                f"{MAX_MULTIPLE}"
            )


def _exponent(number: float) -> int:
    return int(Decimal(str(number)).as_tuple().exponent)


def _shortly(number: int) -> str:
    return str(number) if number < 10**20 else "of more than 20 digits"


def _target(schema: Mapping[str, Any], reference: str) -> Any:
    """What a JSON pointer (RFC 6901) leads to through objects alone; None for what cannot be found so."""
    found: Any = schema
    for step in unquote(reference.partition("#")[2]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found
