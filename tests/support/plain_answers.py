"""What plain transformers generates with SmolLM2 for the prompts of the slow tests, recorded: all of them together take
it a minute.

    python -m tests.support.plain_answers

records all anew. `tests/slow/test_plain_answers.py` generates some of them again in every run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers

from packlight.core.config import DType, ModelConfig
from packlight.models.opened import OpenedModel, open_model
from packlight.models.tokenizer import ChatTokenizer

RECORD = Path(__file__).parents[1] / "fixtures" / "plain_answers.json"
NUM_TOKENS = 16
STORY = (
    "The mill stood by the river, and every morning the miller counted the sacks, {} of them, before the carts came. "
)
FERRY = "On day {} the ferry carried {} sheep and a piano across the sound. "


@dataclass(frozen=True)
class PlainAnswer:
    """A prompt's ids, and the ids of the answer: float32, eager attention, greedy, ends of text forbidden."""

    ids: list[int]
    answer: list[int]


def prompts(tokenizer: ChatTokenizer) -> dict[str, list[int]]:
    """Short, middling and long, shared prefixes, several turns. The documents go beyond a chunk of any size we prefill
    in, and beyond the 1024 tokens at which kernels split what they read."""
    document = "".join(STORY.format(number) for number in range(75))
    tale = "".join(FERRY.format(day, day + 3) for day in range(24))

    def chat(*texts: str) -> list[int]:
        roles = ["user", "assistant"]
        messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts)]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    return {
        "one word": chat("Hi"),
        "question": chat("What is the capital of France?"),
        "list": chat("Name three rivers."),
        "code": chat("Write a Python function that reverses a string."),
        "two turns": chat("Name a colour.", "Blue.", "And another one, please."),
        "two turns, other end": chat("Name a colour.", "Blue.", "And an animal, please."),
        "text": tokenizer.encode("Once upon a time, in a village by the sea,"),
        "tale": chat(f"{tale}\nWhat did the ferry carry besides sheep?"),
        "document, question 1": chat(document + "\nHow many sacks did the miller count first?"),
        "document, question 2": chat(document + "\nWhat stood by the river?"),
    }


def recorded(tokenizer: ChatTokenizer) -> dict[str, PlainAnswer]:
    """By name, in the order of `prompts`. Fails where a prompt is no longer the one that was answered."""
    record = json.loads(RECORD.read_text())["answers"]
    found = {}
    for name, ids in prompts(tokenizer).items():
        assert record[name]["prompt"] == _digest(ids), f"{name}: another prompt; python -m tests.support.plain_answers"
        found[name] = PlainAnswer(ids, record[name]["answer"])
    return found


def plain_model(opened: OpenedModel) -> Any:
    assert opened.folder is not None
    return transformers.AutoModelForCausalLM.from_pretrained(
        opened.folder.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@torch.inference_mode()
def generate(model: Any, ids: list[int]) -> list[int]:
    """The `NUM_TOKENS` after `ids`. The first so many are those of a shorter answer."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
    )
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def _digest(ids: list[int]) -> str:
    return sha256(json.dumps(ids).encode()).hexdigest()


def _written(versions: dict[str, str], answers: dict[str, Any]) -> str:
    """As JSON, an answer a line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(answer)}" for name, answer in answers.items())
    return f'{{\n "versions": {json.dumps(versions)},\n "answers": {{\n{lines}\n }}\n}}\n'


def main() -> None:
    opened = open_model(ModelConfig(path="smollm2", dtype=DType.FLOAT32), on_progress=print)
    model, answers = plain_model(opened), {}
    for name, ids in prompts(opened.tokenizer).items():
        answers[name] = {"num_prompt_tokens": len(ids), "prompt": _digest(ids), "answer": generate(model, ids)}
        print(name, answers[name]["answer"])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RECORD.write_text(_written(versions, answers))


if __name__ == "__main__":
    main()
