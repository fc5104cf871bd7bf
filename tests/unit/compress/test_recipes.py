import subprocess
import sys

import pytest

from packlight.compress.parts import BUDGETS
from packlight.compress.recipes import RECIPES, find_recipe, param_of, recipe_table_markdown
from packlight.core.errors import InvalidRequest
from packlight.core.types import PackSpec


def test_router_modules_import_without_torch():
    names = ["recipes", "options", "budget", "layout", *(f"budgets.{name}" for name in BUDGETS)]
    imports = "".join(f"import packlight.compress.{name}\n" for name in names)
    code = f"import sys\n{imports}sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bounds_of_every_budget_are_known_without_torch():
    code = (
        "import sys\n"
        "from packlight.compress.budget import max_pages\n"
        "from packlight.compress.recipes import RECIPES\n"
        "from packlight.core.types import ModelSpec, PackSpec\n"
        "model = ModelSpec('m', 'f', 4, 2, 64, 10, 8192, (), 'bfloat16')\n"
        "pages = [max_pages(PackSpec(name, 100), model, 1000, 16) for name in RECIPES]\n"
        "sys.exit('torch' in sys.modules or min(pages) <= 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_recipe_of_a_newer_router():
    with pytest.raises(InvalidRequest, match="unknown recipe 'future'"):
        find_recipe("future")


def test_constants_have_defaults_within_their_limits():
    for recipe in RECIPES.values():
        names = [param.name for param in recipe.params]
        assert len(set(names)) == len(names)
        for param in recipe.params:
            assert param.low <= param.default <= param.high
            assert param_of(PackSpec(recipe.name), param.name) == param.default
            given = PackSpec(recipe.name, params=((param.name, param.high),))
            assert param_of(given, param.name) == param.high


def test_a_constant_never_hides_a_common_option():
    common = {"recipe", "budget", "ratio", "window", "sinks", "kernel", "pooling", "codec", "floor"}
    for recipe in RECIPES.values():
        assert not common & {param.name for param in recipe.params}
        assert len(set(recipe.options)) == len(recipe.options)


def test_readme_table_has_every_recipe():
    lines = recipe_table_markdown().splitlines()
    assert len(lines) == 2 + len(RECIPES)
    assert len({line.count("|") for line in lines}) == 1
    assert all(f"| `{name}` |" in recipe_table_markdown() for name in RECIPES)
