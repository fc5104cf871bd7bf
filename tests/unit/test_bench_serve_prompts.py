"""Prompts: as long as they were asked to be, new where they should be, the same where they share."""

from __future__ import annotations

from functools import cache
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from packlight.bench.serve.prompts import Exchange, Prompts, Question, cut_to
from packlight.bench.serve.workloads import WORKLOADS, Conversation, Size
from packlight.core.errors import ConfigError
from packlight.evaluate.prompts import num_shared
from packlight.evaluate.tasks.essays import essay_sentences
from packlight.models.fake_spec import FakeTokenizer
from packlight.models.template import ChatTemplate
from packlight.models.tokenizer import ChatTokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = Size(prompt_tokens=700, num_conversations=3, question_tokens=300, num_turns=3)


@cache
def subwords() -> ChatTokenizer:
    """A byte-level BPE that has read some of the prose that prompts are made of, with ChatML around messages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(essay_sentences(0), 300), trainer)
    return ChatTokenizer(tokenizer, ChatTemplate({"default": CHATML}, {}))


TOKENIZERS = {"bytes": FakeTokenizer, "subwords": subwords}


@pytest.fixture(params=[(name, api) for name in TOKENIZERS for api in ("completions", "chat")], ids=str)
def prompts(request) -> Prompts:
    name, api = request.param
    return Prompts(TOKENIZERS[name](), api)


def first_ids(prompts: Prompts, conversation: Conversation) -> list[int]:
    """The first prompt as the server will see it."""
    fields = prompts.fields(conversation.tag, conversation.questions[0])
    tokenizer = prompts._tokenizer
    return (
        tokenizer.encode(fields["prompt"]) if "prompt" in fields else tokenizer.apply_chat_template(fields["messages"])
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_first_prompts_are_exactly_as_long_as_asked(name: str, prompts: Prompts) -> None:
    made = WORKLOADS[name].make(SIZE, "a", prompts)
    assert len(made) == 3
    assert [len(first_ids(prompts, conversation)) for conversation in made] == [700, 700, 700]


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_makes_the_same_and_another_something_else(name: str) -> None:
    prompts = Prompts(FakeTokenizer(), "completions")
    make = WORKLOADS[name].make
    assert make(SIZE, "a", prompts) == make(SIZE, "a", prompts)
    for one, other in zip(make(SIZE, "a", prompts), make(SIZE, "b", prompts), strict=True):
        assert one.questions[0].content != other.questions[0].content


@pytest.mark.parametrize("name", ["chat", "long_document", "multi_turn"])
def test_cold_prompts_differ_from_their_first_token_on(name: str) -> None:
    prompts = Prompts(subwords(), "completions")
    size = Size(prompt_tokens=300, num_conversations=16, question_tokens=120, num_turns=2)
    made = WORKLOADS[name].make(size, "a", prompts)
    assert len({first_ids(prompts, conversation)[0] for conversation in made}) == 16
    assert not any(conversation.is_follow_up for conversation in made)


def test_a_shared_document_is_shared_up_to_the_question(prompts: Prompts) -> None:
    made = WORKLOADS["shared_document"].make(SIZE, "a", prompts)
    shared = [num_shared(first_ids(prompts, one), first_ids(prompts, other)) for one, other in pairwise(made)]
    # What ends a message is on neither side of the border; a first word may be the same by chance.
    assert all(abs(count - (SIZE.prompt_tokens - SIZE.question_tokens)) <= 25 for count in shared)
    assert [conversation.is_follow_up for conversation in made] == [False, True, True]
    assert len({conversation.questions[0].references for conversation in made}) == 3


@pytest.mark.parametrize("name", ["long_document", "shared_document", "multi_turn"])
def test_every_answer_stands_once_in_its_document(name: str, prompts: Prompts) -> None:
    for conversation in WORKLOADS[name].make(SIZE, "a", prompts):
        document = conversation.questions[0].content
        for question in conversation.questions:
            (value,) = question.references
            assert document.count(f"is: {value}.") == 1
            assert value not in question.answer_prefix


def test_later_turns_only_ask() -> None:
    prompts = Prompts(subwords(), "completions")
    conversation = WORKLOADS["multi_turn"].make(SIZE, "a", prompts)[0]
    assert len(conversation.questions) == 3
    for question in conversation.questions[1:]:
        assert prompts.count_text(question.content + question.answer_prefix) == SIZE.question_tokens


def test_a_conversation_carries_what_was_said() -> None:
    first, second = Question("One?", "It is"), Question("Two?", "They are")
    past = [Exchange(first, " 1")]
    text = Prompts(subwords(), "completions").fields("tag", second, past)["prompt"]
    assert text == (
        "tag\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nIt is 1<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nThey are"
    )
    messages = Prompts(subwords(), "chat").fields("tag", second, past)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in messages] == ["tag", "One?", "It is 1", "Two?"]


@settings(deadline=None, max_examples=20)
@given(st.integers(60, 400), st.integers(0, 5))
def test_prose_is_cut_to_any_length(num_tokens: int, seed: int) -> None:
    prompts = Prompts(subwords(), "completions")

    def write(sentences):
        return Question("Read this. " + " ".join(sentences))

    def count(question):
        return prompts.count("some tag", question)

    assert count(cut_to(num_tokens, write, count, str(seed))) == num_tokens


def test_a_length_that_cannot_be_is_refused_with_the_least_that_can(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match=r"a prompt of 5 tokens is too short: it needs at least \d+"):
        WORKLOADS["long_document"].make(Size(5, 1, 80, 1), "a", prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_hold_for_smollm2(name: str, smollm2) -> None:
    prompts = Prompts(smollm2.tokenizer, "completions")
    size = Size(prompt_tokens=1501, num_conversations=4, question_tokens=120, num_turns=2)
    assert [len(first_ids(prompts, made)) for made in WORKLOADS[name].make(size, "a", prompts)] == [1501] * 4
