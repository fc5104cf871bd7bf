"""What is recorded of plain transformers is still what it says: of a plain text, a chat, and a longer prompt."""

import pytest

from tests.support.plain_answers import generate, plain_model, recorded

pytestmark = pytest.mark.slow


def test_the_record_is_what_transformers_says(smollm2):
    model, record = plain_model(smollm2), recorded(smollm2.tokenizer)
    assert len(record["tale"].ids) > 400
    for name in ("text", "two turns", "tale"):
        assert generate(model, record[name].ids) == record[name].answer, name
