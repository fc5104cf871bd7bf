import subprocess
import sys

import pytest

from packlight.compress.recipes import RECIPES, check_defaults, find_recipe, recipe_table_markdown, resolve
from packlight.core.errors import ConfigError, InvalidRequest
from packlight.core.types import PackSpec


def resolved(options, recipe="snapkv", budget=None):
    return resolve(options, default_recipe=recipe, default_budget=budget)


def test_router_modules_import_without_torch():
    modules = "packlight.compress.recipes, packlight.compress.budget, packlight.compress.layout"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defaults():
    assert resolved({}, recipe="none") == PackSpec()
    assert resolved({}, recipe="none", budget=512) == PackSpec()
    assert resolved({}) == PackSpec("snapkv", ratio=0.25)
    assert resolved({}, budget=512) == PackSpec("snapkv", budget_tokens=512)
    assert resolved({"recipe": None, "budget": None}, budget=512) == PackSpec("snapkv", budget_tokens=512)


def test_request_overrides_defaults():
    assert resolved({"recipe": "none"}, budget=512) == PackSpec()
    assert resolved({"ratio": 1}, budget=512) == PackSpec("snapkv", ratio=1.0)
    assert resolved({"recipe": "streaming_llm", "budget": 70}, recipe="none") == PackSpec("streaming_llm", 70)
    assert resolved({"budget": 9, "window": 4, "sinks": 0, "kernel": 7}) == PackSpec("snapkv", 9, None, 4, 0, 7)


def test_smallest_possible_budget():
    assert resolved({"budget": 37}).budget_tokens == 37
    assert resolved({"budget": 2, "window": 1, "sinks": 0}).budget_tokens == 2


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"recipe": "h3o"}, "recipe", "'h3o'; choose one of none, streaming_llm, snapkv"),
        ({"recipe": 3}, "recipe", "got 3, must be a string"),
        ({"recepi": "snapkv"}, "recepi", "no such option; known are recipe, budget, ratio"),
        ({"budget": 36}, "budget", "got 36, must be at least 37 = 4 sinks + 32 window + 1"),
        ({"budget": 0}, "budget", "got 0, must be an integer from 1"),
        ({"budget": 2**31}, "budget", "to 2147483647"),
        ({"budget": True}, "budget", "got True"),
        ({"budget": 64.0}, "budget", "got 64.0, must be an integer"),
        ({"budget": "64"}, "budget", "got '64'"),
        ({"ratio": 0}, "ratio", "got 0, must be a number above 0 and at most 1"),
        ({"ratio": 1.01}, "ratio", "got 1.01"),
        ({"ratio": float("nan")}, "ratio", "got nan"),
        ({"ratio": True}, "ratio", "got True"),
        ({"ratio": "half"}, "ratio", "got 'half'"),
        ({"ratio": 0.5, "budget": 64}, "ratio", "ratio 0.5 and budget 64; give one of them"),
        ({"recipe": "none", "budget": 64}, "budget", "got 64, but recipe 'none' keeps every token"),
        ({"recipe": "none", "ratio": 0.5}, "ratio", "got 0.5, but recipe 'none'"),
        ({"window": 0}, "window", "got 0, must be an integer from 1 to 1024"),
        ({"window": 1025}, "window", "got 1025"),
        ({"window": [1]}, "window", "got [1]"),
        ({"sinks": -1}, "sinks", "got -1, must be an integer from 0 to 256"),
        ({"sinks": 257}, "sinks", "got 257"),
        ({"kernel": 0}, "kernel", "got 0, must be an integer from 1 to 1023"),
        ({"kernel": 8}, "kernel", "got 8, must be odd"),
        ({"kernel": 1025}, "kernel", "got 1025"),
    ],
)
def test_refusals_name_the_option_the_value_and_the_limit(options, param, said):
    with pytest.raises(InvalidRequest) as caught:
        resolved(options)
    assert caught.value.param == f"kv.{param}"
    assert caught.value.message.startswith(f"kv.{param}: ")
    assert said in caught.value.message


def test_window_that_outgrows_the_default_budget():
    with pytest.raises(InvalidRequest, match=r"got 100 \(the default\), must be at least 205") as caught:
        resolved({"window": 200}, budget=100)
    assert caught.value.param == "kv.budget"


def test_defaults_are_checked_at_start():
    check_defaults("none", None)
    check_defaults("snapkv", 64)
    with pytest.raises(ConfigError, match="unknown recipe 'snap'"):
        check_defaults("snap", None)
    with pytest.raises(ConfigError, match="must be at least 37"):
        check_defaults("snapkv", 10)


def test_unknown_recipe_of_a_newer_router():
    with pytest.raises(InvalidRequest, match="unknown recipe 'future'"):
        find_recipe("future")


def test_readme_table_has_every_recipe():
    lines = recipe_table_markdown().splitlines()
    assert len(lines) == 2 + len(RECIPES)
    assert len({line.count("|") for line in lines}) == 1
    assert all(f"| `{name}` |" in recipe_table_markdown() for name in RECIPES)
