"""The map of a selection says what looking at every token of it would say."""

import pytest

from packlight.compress.kept_counts import KeptCounts
from packlight.core.kept_map import ALL, MAX_BINS
from packlight.core.types import ModelSpec, PackSpec
from tests.support.packing import make_layers, select_all


def model_of(num_layers, num_kv_heads=2):
    return ModelSpec("m", "f", num_layers, num_kv_heads, 8, 100, 4096, (), "float32")


def map_of(selections, num_tokens):
    counts = KeptCounts(model_of(len(selections)), num_tokens)
    for layer, selection in enumerate(selections):
        counts.add(layer, selection)
    return counts.as_map()


def looked_at(selections, kept):
    """The shares, token by token."""
    rows = []
    for group in range(kept.num_groups):
        heads = [set(index.tolist()) for layer in kept.layers(group) for index in selections[layer].indices]
        for start in range(0, kept.num_tokens, kept.bin_tokens):
            tokens = range(start, min(start + kept.bin_tokens, kept.num_tokens))
            rows.append(sum(token in head for head in heads for token in tokens) / (len(heads) * len(tokens)))
    return rows


@pytest.mark.parametrize("recipe", ["snapkv", "pyramidkv", "adakv", "cake", "h2o", "streaming_llm", "none", "quest"])
@pytest.mark.parametrize("num_layers", [1, 4, 9])
def test_every_recipe(recipe, num_layers):
    views = make_layers(60, 8, num_layers)
    pack = PackSpec(recipe, None if recipe == "none" else 24, window=8, sinks=2)
    selections = select_all(views, pack)
    kept = map_of(selections, 60)
    assert kept.is_whole
    assert [share / ALL for share in kept.shares] == pytest.approx(looked_at(selections, kept), abs=1 / ALL)
    for group, mean in enumerate(kept.num_kept_tokens):
        lengths = [length for layer in kept.layers(group) for length in selections[layer].lengths()]
        assert mean == pytest.approx(sum(lengths) / len(lengths))


def test_wide_bins_the_last_of_which_is_narrower():
    num_tokens = MAX_BINS + 1  # two tokens to a bin, one in the last
    selections = select_all(make_layers(num_tokens, 8, 2), PackSpec("snapkv", 40, window=8, sinks=2))
    kept = map_of(selections, num_tokens)
    assert (kept.bin_tokens, kept.num_bins) == (2, MAX_BINS // 2 + 1)
    assert [share / ALL for share in kept.shares] == pytest.approx(looked_at(selections, kept), abs=1 / ALL)
    assert kept.row(0)[0] == kept.row(1)[-1] == ALL, "sinks and window"


def test_a_sliding_window_keeps_its_last_tokens():
    windows = [16, None]
    selections = select_all(make_layers(60, 8, 2), PackSpec("snapkv", 24, window=8, sinks=2), sliding_windows=windows)
    kept = map_of(selections, 60)
    assert list(kept.row(0)) == [0] * 44 + [ALL] * 16
    assert kept.num_kept_tokens[0] == 16


def test_tokens_generated_before_a_resumption_are_not_the_prompts():
    views = make_layers(60, 8, 2)
    pack = PackSpec("snapkv", 24, window=8, sinks=2)
    assert map_of(select_all(views, pack, num_tokens=75), 60) == map_of(select_all(views, pack), 60)
