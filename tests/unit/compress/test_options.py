import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.compress.options import check_model, resolve
from packlight.compress.parts import CODECS, codecs_for
from packlight.compress.recipes import RECIPES
from packlight.core.errors import InvalidRequest
from packlight.core.types import ModelSpec, PackSpec, Pooling


def resolved(options, recipe="snapkv", budget=None, floor=0.0):
    return resolve(options, default_recipe=recipe, default_budget=budget, default_floor=floor)


def refusal(options):
    try:
        resolved(options)
    except InvalidRequest as error:
        return error
    return None


def packed(*args, **options):
    """A spec as `resolve` fills it in: the codec is named."""
    return PackSpec(*args, codec="native", **options)


def model(num_kv_heads=3, head_dim=64):
    return ModelSpec("small", "f", 30, num_kv_heads, head_dim, 49152, 8192, (), "bfloat16")


def test_defaults():
    assert resolved({}, recipe="none") == packed()
    assert resolved({}, recipe="none", budget=512, floor=0.9) == packed()
    assert resolved({}) == packed("snapkv", ratio=0.25)
    assert resolved({}, budget=512, floor=0.9) == packed("snapkv", budget_tokens=512, mass_floor=0.9)
    assert resolved({"recipe": None, "budget": None}, budget=512) == packed("snapkv", budget_tokens=512)


def test_recipes_have_their_own_defaults():
    assert resolved({"recipe": "rocketkv"}) == packed("rocketkv", ratio=0.25, kernel=63)
    assert resolved({"recipe": "rocketkv_mt"}) == packed("rocketkv_mt", ratio=0.25, kernel=63, window=128)
    assert resolved({"recipe": "mass"}) == packed("mass")
    assert resolved({"recipe": "mass"}, budget=700) == packed("mass", 700)


def test_request_overrides_defaults():
    assert resolved({"recipe": "none"}, budget=512) == packed()
    assert resolved({"ratio": 1}, budget=512) == packed("snapkv", ratio=1.0)
    assert resolved({"recipe": "streaming_llm", "budget": 70}, recipe="none") == packed("streaming_llm", 70)
    assert resolved({"budget": 9, "window": 4, "sinks": 0, "kernel": 7}) == packed("snapkv", 9, None, 4, 0, 7)
    assert resolved({"pooling": "avg"}).pooling is Pooling.AVG
    assert resolved({"codec": "int4"}).codec == "int4"
    assert resolved({"floor": 0}, floor=0.9).mass_floor == 0.0


def test_constants_of_the_method_come_sorted_and_only_if_given():
    assert resolved({"recipe": "h2o"}).params == ()
    assert resolved({"recipe": "h2o", "recent": 1, "evict": True}).params == (("evict", 1.0), ("recent", 1.0))
    assert resolved({"recipe": "h2o", "recent": None, "evict": False}).params == (("evict", 0.0),)
    assert resolved({"recipe": "cake", "tau2": 0.4, "gamma": 0}).params == (("gamma", 0.0), ("tau2", 0.4))


def test_smallest_possible_budget():
    assert resolved({"budget": 37}).budget_tokens == 37
    assert resolved({"budget": 2, "window": 1, "sinks": 0}).budget_tokens == 2


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"recipe": "h3o"}, "recipe", "unknown recipe 'h3o'; choose one of none, streaming_llm, h2o, "),
        ({"recipe": 3}, "recipe", "got 3, must be a string"),
        ({"recepi": "snapkv"}, "recepi", "recipe 'snapkv' has no such option; it has recipe, codec, budget, ratio"),
        ({"budget": 36}, "budget", "got 36, must be at least 37 = 4 sinks + 32 window + 1"),
        ({"budget": 0}, "budget", "got 0, must be an integer from 1"),
        ({"budget": -64}, "budget", "got -64, must be an integer from 1 to 2147483647"),
        ({"budget": 2**31}, "budget", "to 2147483647"),
        ({"budget": True}, "budget", "got True"),
        ({"budget": 64.0}, "budget", "got 64.0, must be an integer"),
        ({"budget": "64"}, "budget", "got '64'"),
        ({"ratio": 0}, "ratio", "got 0, must be a number above 0 and at most 1"),
        ({"ratio": -0.5}, "ratio", "got -0.5"),
        ({"ratio": 1.01}, "ratio", "got 1.01"),
        ({"ratio": float("nan")}, "ratio", "got nan"),
        ({"ratio": True}, "ratio", "got True"),
        ({"ratio": "half"}, "ratio", "got 'half'"),
        ({"ratio": 0.5, "budget": 64}, "ratio", "ratio 0.5 and budget 64; give one of them"),
        ({"recipe": "none", "budget": 64}, "budget", "got 64, but recipe 'none' keeps every token"),
        ({"recipe": "none", "ratio": 0.5}, "ratio", "got 0.5, but recipe 'none'"),
        ({"recipe": "none", "floor": 0.5}, "floor", "got 0.5, but recipe 'none'"),
        ({"recipe": "quest", "floor": 0.5}, "floor", "got 0.5, but recipe 'quest'"),
        ({"recipe": "none", "window": 8}, "window", "recipe 'none' has no such option; it has recipe, codec"),
        ({"recipe": "quest", "sinks": 8}, "sinks", "recipe 'quest' has no such option"),
        ({"recipe": "streaming_llm", "kernel": 7}, "kernel", "recipe 'streaming_llm' has no such option"),
        ({"recipe": "cake", "pooling": "max"}, "pooling", "recipe 'cake' has no such option"),
        ({"recipe": "snapkv", "gamma": 5}, "gamma", "recipe 'snapkv' has no such option"),
        ({"window": 0}, "window", "got 0, must be an integer from 1 to 1024"),
        ({"window": 1025}, "window", "got 1025"),
        ({"window": [1]}, "window", "got [1]"),
        ({"sinks": -1}, "sinks", "got -1, must be an integer from 0 to 256"),
        ({"sinks": 257}, "sinks", "got 257"),
        ({"kernel": 0}, "kernel", "got 0, must be an integer from 1 to 1023"),
        ({"kernel": 8}, "kernel", "got 8, must be odd"),
        ({"kernel": 1025}, "kernel", "got 1025"),
        ({"pooling": "min"}, "pooling", "unknown pooling 'min'; choose one of max, avg"),
        ({"codec": "int3"}, "codec", "unknown codec 'int3'; choose one of native, bf16, fp8"),
        ({"floor": 1}, "floor", "got 1, must be a share of the attention mass, from 0 to below 1"),
        ({"floor": -0.1}, "floor", "got -0.1"),
        ({"floor": float("nan")}, "floor", "got nan"),
        ({"recipe": "adakv", "alpha": 1.5}, "alpha", "got 1.5, must be a number from 0 to 1"),
        ({"recipe": "pyramidkv", "beta": 0}, "beta", "got 0, must be a number from 1 to 1000"),
        ({"recipe": "h2o", "evict": 1}, "evict", "got 1, must be true or false"),
        ({"recipe": "h2o", "recent": False}, "recent", "got False, must be a number from 0 to 1"),
    ],
)
def test_refusals_name_the_option_the_value_and_the_limit(options, param, said):
    with pytest.raises(InvalidRequest) as caught:
        resolved(options)
    assert caught.value.param == f"kv.{param}"
    assert caught.value.message.startswith(f"kv.{param}: ")
    assert said in caught.value.message


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_option_of_a_recipe_is_read(recipe):
    """What is out of every range is refused for its value, not for its name."""
    for name in recipe.options:
        with pytest.raises(InvalidRequest, match=r"got|unknown"):
            resolved({"recipe": recipe.name, name: "nothing"})


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted({name for recipe in RECIPES.values() for name in recipe.options})),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=3)
        | st.lists(st.integers(), max_size=1),
    )
)
def test_anything_that_is_json_is_read_or_refused_by_name(options):
    error = refusal(options)
    assert error is None or error.param.removeprefix("kv.") in options


def test_window_that_outgrows_the_default_budget():
    with pytest.raises(InvalidRequest, match=r"got 100 \(the default\), must be at least 205") as caught:
        resolved({"window": 200}, budget=100)
    assert caught.value.param == "kv.budget"


@pytest.mark.parametrize(
    ("spec", "model", "param", "said"),
    [
        (
            PackSpec("adakv", 64),
            model(num_kv_heads=1),
            "recipe",
            "'adakv' divides tokens among the KV heads of a layer, and model 'small' has one; choose one of none, ",
        ),
        (PackSpec("snapkv", 8193), model(), "budget", "got 8193, model 'small' takes 8192 at most"),
        (
            PackSpec("none", codec="turboquant3"),
            model(head_dim=80),
            "codec",
            "model 'small' has 80; choose one of native, bf16, fp8, int8, int4, int2",
        ),
    ],
)
def test_what_a_model_cannot_have(spec, model, param, said):
    with pytest.raises(InvalidRequest) as caught:
        check_model(spec, model)
    assert caught.value.param == f"kv.{param}"
    assert said in caught.value.message


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_model_can_have(name):
    for codec in CODECS:
        check_model(PackSpec(name, 8192, codec=codec), model())


def test_codecs_for_a_head_dim():
    assert codecs_for(64) == codecs_for(128) == tuple(CODECS)
    assert not any(name.startswith("turboquant") for name in codecs_for(96))
    for dim in (64, 96):
        for name in codecs_for(dim):
            assert CODECS.load(name)().record_bytes(16, dim, torch.bfloat16) > 0
