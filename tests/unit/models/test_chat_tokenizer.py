"""Tokenizers and chat templates, against `tokenizers` and transformers' own rendering."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.utils.chat_template_utils import render_jinja_template

from packlight.core.errors import InvalidRequest, ModelError
from packlight.models.template import ChatTemplate
from packlight.models.tokenizer import ChatTokenizer
from tests.support.tiny_models import CHATML, SPECIAL_TOKENS, tiny_tokenizer
from tests.unit.models.texts import TRICKY_TEXTS

HELLO = [{"role": "user", "content": "the thing"}]
CHATS: list[list[dict[str, Any]]] = [
    HELLO,
    [{"role": "system", "content": "Be <brief> & 'kind'."}, *HELLO],
    [*HELLO, {"role": "assistant", "content": "ok\n"}, {"role": "user", "content": " 12  3 日本 "}],
    [*HELLO, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": [1, None]}}]}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a <b> & 'c' é", "parameters": {"x": True}}}]
TEMPLATES = {
    "chatml": CHATML,
    "blocks": "{%- for m in messages %}\n  {% if m.x %}\n  [U]\n  {% endif %}\n {{ m.role }}\n{%- endfor %}",
    "tools": "{% if tools %}{{ tools | tojson }} {{ tools | tojson(indent=2) }}{% endif %}{{ bos_token, messages }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }};{% endfor %}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "arguments": "{{ enable_thinking | default('unset') }} {{ documents is none }} {{ add_generation_prompt }}",
    "strings": "{{ messages[0]['content'].split('t') | join('-') | trim }} {{ messages[-1].x is defined }}",
}
FIXED = datetime(2026, 11, 22, 9, 5)


def write(folder: Path, tokenizer: Tokenizer, **files: Any) -> ChatTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return ChatTokenizer.from_folder(folder, now=lambda: FIXED)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "chat_template.jinja").write_text(CHATML)
    return write(folder, tiny_tokenizer())


def sentencepiece_like(*, prefix: bool) -> Tokenizer:
    """What Llama 2, Mistral and Gemma use: blanks become U+2581, unknown bytes become <0xNN>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "t", "h", "e", "▁t", "he", "▁the", "▁▁", "1", "a"):
        vocab[piece] = len(vocab)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_bytes_of_the_tokens_are_the_text(tokenizer: ChatTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == tiny_tokenizer().encode(text).ids
    plain = text
    for special in SPECIAL_TOKENS:
        plain = plain.replace(special, "")
    assert b"".join(map(tokenizer.token_bytes, ids)) == plain.encode()
    assert tokenizer.decode(ids) == plain
    assert sum(map(tokenizer.is_special, ids)) == sum(map(text.count, SPECIAL_TOKENS))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_bytes_of_any_text_come_back(tokenizer: ChatTokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "▁" not in text and "<" not in text))
def test_bytes_of_any_text_come_back_from_sentencepiece(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = write(tmp_path_factory.getbasetemp(), sentencepiece_like(prefix=False))
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_sentencepiece_models_that_begin_with_a_blank_keep_it(tmp_path: Path) -> None:
    """A token in the middle of an answer must keep its blank, and a token does not know where it stands."""
    tokenizer = write(tmp_path, sentencepiece_like(prefix=True))
    assert tokenizer.decode(tokenizer.encode("the the")) == " the the"
    assert tokenizer.encode("the") != tokenizer.encode("the", add_special_tokens=True)
    assert tokenizer.encode("the", add_special_tokens=True)[0] == 1
    assert tokenizer.token_bytes(1) == b""
    assert tokenizer.token_bytes(3 + 0xE2) == b"\xe2"


def test_a_character_cut_in_two_is_not_lost(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("日")
    assert len(ids) == 3
    assert [tokenizer.token_bytes(index) for index in ids] == [b"\xe6", b"\x97", b"\xa5"]
    assert tokenizer.decode(ids[:2]) == "�"


def test_ids_that_only_the_logits_have_stand_for_nothing(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert not tokenizer.is_special(tokenizer.vocab_size + 5)


def test_user_defined_tokens_are_plain_text(tmp_path: Path) -> None:
    plain = tiny_tokenizer()
    plain.add_tokens([AddedToken("<tool> é", special=False, normalized=False)])
    tokenizer = write(tmp_path, plain)
    ids = tokenizer.encode("a<tool> éb")
    assert len(ids) == 3
    assert tokenizer.token_bytes(ids[1]) == "<tool> é".encode()
    assert not tokenizer.is_special(ids[1])


def test_saved_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    cutting = tiny_tokenizer()
    cutting.enable_truncation(4)
    cutting.enable_padding(length=8)
    assert len(write(tmp_path, cutting).encode("0123456789")) > 4
    assert len(write(tmp_path, cutting).encode("0")) == 1


def test_text_that_is_not_unicode(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        tokenizer.encode("a\ud800b")


def test_ends_are_united(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "generation_config": {"eos_token_id": [7, 2]},
        "config": {"eos_token_id": 9},
        "tokenizer_config": {"eos_token": {"content": "<|endoftext|>"}},
    }
    assert write(tmp_path, tiny_tokenizer(), **files).eos_token_ids == (7, 2, 9, 0)


def test_no_end_at_all(tmp_path: Path) -> None:
    assert write(tmp_path, tiny_tokenizer(), config={"eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", range(len(CHATS)))
def test_templates_render_as_in_transformers(name: str, chat: int) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate({"default": TEMPLATES[name]}, variables)
    for tools, extra in [(None, {}), (TOOLS, {"enable_thinking": False})]:
        for prompt in (True, False):
            theirs = render_jinja_template(
                [CHATS[chat]],
                tools=tools,
                chat_template=TEMPLATES[name],
                add_generation_prompt=prompt,
                **variables,
                **extra,
            )[0][0]
            assert template.render(CHATS[chat], tools=tools, add_generation_prompt=prompt, **extra) == theirs


def test_chat_is_rendered_and_its_special_tokens_are_recognised(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.render(HELLO) == "<|im_start|>user\nthe thing<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(HELLO)
    assert ids == tokenizer.encode(tokenizer.render(HELLO))
    assert [index for index in ids if tokenizer.is_special(index)] == [1, 2, 1]
    without = tokenizer.apply_chat_template(HELLO, add_generation_prompt=False)
    assert ids == without + tokenizer.encode("<|im_start|>assistant\n")


def test_no_second_bos(tmp_path: Path) -> None:
    """The template writes the BOS, and the tokenizer would add one too."""
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = write(tmp_path, sentencepiece_like(prefix=False), tokenizer_config={"bos_token": "<s>"})
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}]).count(1) == 1


def test_the_date_is_the_clocks(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y %H:%M') }}")
    assert write(tmp_path, tiny_tokenizer()).render(HELLO) == "22 Nov 2026 09:05"


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] + '.' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant", "content": "a"}], "roles must alternate"),
        ([{"role": "user", "content": None}], "unsupported operand|concatenate"),
        ([{"role": "user"}], "no attribute 'content'"),
        ([{"role": "user", "content": ["a"]}], "concatenate"),
    ],
)
def test_messages_that_a_template_refuses(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        ChatTemplate({"default": ALTERNATING}, {}).render(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(attack: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate({"default": attack}, {}).render(HELLO)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        write(tmp_path, tiny_tokenizer()).render(HELLO)


def test_where_templates_may_lie(tmp_path: Path) -> None:
    """In tokenizer_config.json as text or as a list by name, in older and newer files of their own; the file wins."""

    def rendered(tools: Any = None, **files: Any) -> str:
        return write(tmp_path, tiny_tokenizer(), **files).render(HELLO, tools=tools)

    assert rendered(chat_template={"chat_template": "old file"}) == "old file"
    assert rendered(tokenizer_config={"chat_template": "text"}) == "text"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    assert rendered(tokenizer_config={"chat_template": named}) == "one"
    assert rendered(tools=TOOLS) == "two"
    (tmp_path / "chat_template.jinja").write_bytes("zeile\r\n{{ bos_token }}é".encode())
    assert rendered(tokenizer_config={"chat_template": named, "bos_token": "B"}) == "zeile\nBé"


def test_unusable_files_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        ChatTokenizer.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match="does not parse") as caught:
        write(tmp_path, tiny_tokenizer())
    assert str(tmp_path) in caught.value.message
    (tmp_path / "chat_template.jinja").unlink()
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="no exact bytes"):
        write(tmp_path, words)
