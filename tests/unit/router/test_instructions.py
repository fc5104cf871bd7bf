"""What of a conversation instructs, and whether a model thinks: asked of templates of the kinds that models ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.core.errors import InvalidRequest
from packlight.models.template import ChatTemplate
from packlight.router.instructions import Instructions
from packlight.router.schema import ChatBody, Message
from packlight.router.thinking import asks_to_think, thinks_by_default
from tests.support.tiny_tokenizer import TinyTokenizer, tiny_tokenizer

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# The system prompt inside the first question, as Llama 2 and Gemma have it.
MERGED = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n\n' %}{% else %}[{{ m.role }}] {{ ns.system }}{{ m.content | trim }}\n"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}" + CHATML
# Takes thoughts out of all turns but the last, and so changes turns that were.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.revindex <= 2 else m.content.split('#')[-1] }}<|im_end|>\n{% endfor %}"
)


class Templated(TinyTokenizer):
    """The tiny vocabulary behind a template of a test's choice. Remembers how many tokens it made of conversations."""

    def __init__(self, template: str) -> None:
        self.__dict__.update(tiny_tokenizer().__dict__)
        self._template = ChatTemplate({"default": template}, {})
        self.num_tokens_made: list[int] = []

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        ids = self.encode(self._template.render(messages, **kwargs))
        self.num_tokens_made.append(len(ids))
        return ids

    def dated(self, today: str, messages: Sequence[Message]) -> list[int]:
        return self.apply_chat_template([message.model_dump(exclude_none=True) for message in messages], today=today)

    def of(self, messages: Sequence[Message]) -> list[int]:
        return self.apply_chat_template([message.model_dump(exclude_none=True) for message in messages])


def chat(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content, tool_call_id="1") for role, content in turns]


def shared_text(template: str, messages: list[Message], limit: int = 1000) -> str:
    """The text of the tokens that instruct."""
    tokenizer = Templated(template)
    ids = tokenizer.of(messages)
    num = Instructions().num_tokens(messages, ids, limit, tokenizer.of)
    assert num <= limit
    return tokenizer.text(ids[:num])


# ── what instructs ───────────────────────────────────────────────────────────────────────────────────────────────────

BRIEF = (SYSTEM, "Be brief.")
SHOTS = [(USER, "one"), (ASSISTANT, "uno"), (USER, "two"), (ASSISTANT, "dos")]
ASK = (USER, "three")


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([ASK], ""),
        ([BRIEF, ASK], "system\nBe brief.\nuser\n"),
        ([("developer", "Be brief."), (SYSTEM, "Be kind."), ASK], "developer\nBe brief.\nsystem\nBe kind.\nuser\n"),
        ([*SHOTS, ASK], "user\none\nassistant\nuno\nuser\ntwo\nassistant\ndos\nuser\n"),
        ([BRIEF, *SHOTS[:2], ASK], "system\nBe brief.\nuser\none\nassistant\nuno\nuser\n"),
        ([BRIEF, (USER, "0"), (ASSISTANT, "0"), (USER, "0")], "system\nBe brief.\nuser\n0\nassistant\n0\nuser\n"),
        ([BRIEF, (USER, "a"), (USER, "b")], "system\nBe brief.\nuser\n"),
        ([BRIEF, *SHOTS[:2], (SYSTEM, "Stop."), *SHOTS[2:], ASK], "system\nBe brief.\nuser\n"),
        ([BRIEF, (USER, "a"), (TOOL, "b"), (ASSISTANT, "c"), ASK], "system\nBe brief.\nuser\n"),
        ([BRIEF], ""),
        ([BRIEF, (ASSISTANT, "Hello."), ASK], ""),
        ([(ASSISTANT, "Hello."), ASK], ""),
    ],
)
def test_the_system_prompt_and_whole_turns_before_the_last_question(turns: list[tuple[str, str]], text: str) -> None:
    assert shared_text(CHATML, chat(*turns)) == text


def test_a_system_prompt_inside_the_first_question() -> None:
    assert shared_text(MERGED, chat(BRIEF, ASK)) == "[user] Be brief.\n\n"
    assert shared_text(MERGED, chat(BRIEF, (USER, "  0"))) == "[user] Be brief.\n\n"
    assert shared_text(MERGED, chat(BRIEF, *SHOTS[:2], ASK)).startswith("[user] Be brief.\n\none\n[assistant] uno\n")


def test_a_template_that_refuses_the_shorter_conversation_protects_nothing() -> None:
    tokenizer = Templated(STRICT)
    with pytest.raises(InvalidRequest):
        tokenizer.of(chat(*SHOTS, ASK))
    whole = Templated(CHATML).of(chat(*SHOTS, ASK))
    assert Instructions().num_tokens(chat(*SHOTS, ASK), whole, 1000, tokenizer.of) == 0


def test_only_what_the_prompt_really_begins_with() -> None:
    turns = chat((USER, "one"), (ASSISTANT, "I see#uno"), (USER, "two"), (ASSISTANT, "hm#dos"), ASK)
    whole = "user\none\nassistant\nuno\nuser\ntwo\nassistant\nhm#dos\nuser\n"
    assert shared_text(FORGETFUL, turns) == whole
    num_tokens = len(Templated(FORGETFUL).encode(whole))
    # After the first turn alone its thoughts would still be there, and in the prompt they are not.
    assert shared_text(FORGETFUL, turns, num_tokens - 1) == "user\none\nassistant\n"


def test_the_longest_run_that_fits() -> None:
    messages = chat(BRIEF, *SHOTS, ASK)
    found = {shared_text(CHATML, messages, limit) for limit in range(100)}
    first, second = "system\nBe brief.\nuser\n", "one\nassistant\nuno\nuser\n"
    assert found == {"", first, first + second, first + second + "two\nassistant\ndos\nuser\n"}


def test_a_document_is_not_tokenised_again() -> None:
    document = "Pages of keys and values are shipped from one worker to another. " * 2000
    tokenizer = Templated(CHATML)
    messages = chat(BRIEF, (USER, document), (ASSISTANT, "I see."), (USER, document), (ASSISTANT, "So?"), ASK)
    ids = tokenizer.of(messages)
    tokenizer.num_tokens_made.clear()
    num = Instructions().num_tokens(messages, ids, 500, tokenizer.of)
    assert tokenizer.text(ids[:num]) == "system\nBe brief.\nuser\n"
    assert sum(tokenizer.num_tokens_made) < 100


@settings(deadline=None, max_examples=40)  # tokenisers are slow on a busy machine
@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=40),
    limit=st.integers(1, 3000),
    has_system=st.booleans(),
)
def test_the_search_is_short_and_finds_what_trying_all_finds(lengths: list[int], limit: int, has_system: bool) -> None:
    turns = [turn for length in lengths for turn in ((USER, "a" * length), (ASSISTANT, "b" * length))]
    messages = chat(*[BRIEF] * has_system, *turns, ASK)
    tokenizer = Templated(CHATML)
    ids = tokenizer.of(messages)
    tokenizer.num_tokens_made.clear()
    num = Instructions().num_tokens(messages, ids, limit, tokenizer.of)
    assert len(tokenizer.num_tokens_made) <= 7, "one, and halving"
    ends = range(has_system or 2, len(messages), 2)
    others = [tokenizer.of([*messages[:end], *chat((USER, "0"))]) for end in ends]
    shared = [len([*takewhile(lambda pair: pair[0] == pair[1], zip(ids, other, strict=False))]) for other in others]
    assert num == max((tokens for tokens in shared if tokens <= limit), default=0)


# ── what is remembered ───────────────────────────────────────────────────────────────────────────────────────────────

DATED = "{{ today }} " + CHATML


def test_what_an_application_always_says_is_tokenised_once() -> None:
    tokenizer, instructions = Templated(CHATML), Instructions()
    for question in ("three", "four", "0", "00", " 0?"):
        messages = chat(BRIEF, *SHOTS[:2], (USER, question))
        ids = tokenizer.of(messages)
        num = instructions.num_tokens(messages, ids, 1000, tokenizer.of)
        assert tokenizer.text(ids[:num]) == "system\nBe brief.\nuser\none\nassistant\nuno\nuser\n"
    assert len(tokenizer.num_tokens_made) == 5 + 2, "one beside a question that begins with 0, one beside the others"


@settings(deadline=None, max_examples=60)
@given(
    conversations=st.lists(
        st.tuples(st.lists(st.sampled_from([BRIEF, *SHOTS]), max_size=4), st.text("0 1ab\n", max_size=4)), max_size=8
    ),
    template=st.sampled_from([CHATML, MERGED, FORGETFUL]),
    limit=st.integers(1, 60),
)
def test_what_is_remembered_changes_nothing(
    conversations: list[tuple[list[tuple[str, str]], str]], template: str, limit: int
) -> None:
    tokenizer, instructions = Templated(template), Instructions(max_runs=3)
    for turns, question in conversations:
        messages = chat(*turns, (USER, question))
        ids = tokenizer.of(messages)
        fresh = Instructions().num_tokens(messages, ids, limit, tokenizer.of)
        assert instructions.num_tokens(messages, ids, limit, tokenizer.of) == fresh


def test_a_template_that_writes_the_date_and_one_that_has_options() -> None:
    instructions, messages = Instructions(), chat(BRIEF, ASK)
    for today in ("Monday", "Tuesday", "Wednesday, at last", "Monday"):
        tokenizer = Templated(DATED)
        of = partial(tokenizer.dated, today)
        ids = of(messages)
        assert tokenizer.text(ids[: instructions.num_tokens(messages, ids, 1000, of)]).startswith(f"{today} system")
        assert len(tokenizer.num_tokens_made) == 2
        assert instructions.num_tokens(messages, ids, 1000, of, options="other") > 0
        assert len(tokenizer.num_tokens_made) == 3


def test_calls_of_tools_are_told_apart() -> None:
    tokenizer = Templated("{% for m in messages %}{{ m.role }} {{ m.tool_calls }}{{ m.content }}\n{% endfor %}")
    instructions = Instructions()
    for name in ("look", "listen"):
        call = Message(role=ASSISTANT, tool_calls=[{"id": "1", "function": {"name": name, "arguments": ""}}])
        messages = [*chat((USER, "one")), call, *chat(ASK)]
        ids = tokenizer.of(messages)
        text = tokenizer.text(ids[: instructions.num_tokens(messages, ids, 1000, tokenizer.of)])
        assert name in text


def test_the_least_recently_used_is_forgotten() -> None:
    tokenizer, instructions = Templated(CHATML), Instructions(max_runs=2)

    def num_made(system: str) -> int:
        messages = chat((SYSTEM, system), ASK)
        ids, num_before = tokenizer.of(messages), len(tokenizer.num_tokens_made)
        instructions.num_tokens(messages, ids, 1000, tokenizer.of)
        return len(tokenizer.num_tokens_made) - num_before

    assert [num_made(system) for system in "abacab"] == [1, 1, 0, 1, 0, 1]


# ── thinking ─────────────────────────────────────────────────────────────────────────────────────────────────────────

QWEN3 = (
    CHATML
    + GENERATION
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}"
)
OFF_UNLESS_ASKED = CHATML + GENERATION + "{% if not enable_thinking %}<think></think>{% endif %}"
R1 = CHATML + GENERATION + "{% if add_generation_prompt %}<think>\n{% endif %}"
GPT_OSS = "Reasoning: {{ reasoning_effort | default('medium') }}\n" + CHATML + GENERATION
NO_EFFORT_UNLESS_ASKED = GPT_OSS.replace("medium", "none")
REFUSES = "{{ raise_exception('no') }}"


@pytest.mark.parametrize(
    ("template", "thinks"),
    [
        (CHATML + GENERATION, False),
        (MERGED, False),
        (QWEN3, True),
        (OFF_UNLESS_ASKED, False),
        (R1, True),
        (GPT_OSS, True),
        (NO_EFFORT_UNLESS_ASKED, False),
        (REFUSES, False),
    ],
)
def test_a_template_tells_whether_its_model_thinks(template: str, thinks: bool) -> None:
    assert thinks_by_default(Templated(template)) is thinks


@pytest.mark.parametrize("by_default", [False, True])
@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({}, (False, True)),
        ({"reasoning_effort": "high"}, (True, True)),
        ({"reasoning_effort": "low"}, (True, True)),
        ({"reasoning_effort": "minimal"}, (False, True)),
        ({"reasoning_effort": "none"}, (False, True)),
        ({"chat_template_kwargs": {"reasoning_effort": "medium"}}, (True, True)),
        ({"chat_template_kwargs": {"enable_thinking": True}}, (True, True)),
        ({"chat_template_kwargs": {"enable_thinking": False}}, (False, False)),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, (False, False)),
    ],
)
def test_a_request_asks_to_think(fields: dict[str, Any], answers: tuple[bool, bool], by_default: bool) -> None:
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "Why?"}], **fields})
    assert asks_to_think(body, by_default=by_default) is answers[by_default]
