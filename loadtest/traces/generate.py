"""Makes `sample.jsonl`: a made-up trace in the format that the Mooncake project published its traces in.

    python loadtest/traces/generate.py loadtest/traces/sample.jsonl

Conversations begin as a Poisson process. A tenth of them ask one long agent's prompt, the rest one of five short
assistants'; behind it comes the user's own text, log-normal in length with a long tail. A third of answers are followed
by another turn, an exponential pause later, whose input is all that was there before, the answer, and a new message.
Blocks have 512 tokens; a block has the id of another one exactly if all text up to its end is the same. Output lengths
are log-normal, too. All parameters are the constants below. The same seed makes the same file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

BLOCK_TOKENS = 512
DURATION_S, CONVERSATIONS_PER_S = 120.0, 0.35
SYSTEM_TOKENS = (9000, 600, 1100, 1600, 2300, 700)  # the first is the agent's
AGENT_SHARE, ANOTHER_TURN_SHARE, PAUSE_S = 0.1, 0.35, 12.0
# Median and sigma of log-normal lengths, in tokens, and the longest there is.
FIRST_MESSAGE, NEXT_MESSAGE, ANSWER, MOST_INPUT_TOKENS = (900.0, 1.1), (150.0, 0.9), (220.0, 0.8), 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    lines = sorted(generate(Random(options.seed)), key=itemgetter("timestamp"))
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def generate(rng: Random) -> Iterator[dict[str, Any]]:
    """Requests, conversation by conversation."""
    ids = BlockIds()
    at_s, number = rng.expovariate(CONVERSATIONS_PER_S), 0
    while at_s < DURATION_S:
        yield from converse(rng, ids, at_s, f"conversation {number}")
        at_s, number = at_s + rng.expovariate(CONVERSATIONS_PER_S), number + 1


def converse(rng: Random, ids: BlockIds, at_s: float, name: str) -> Iterator[dict[str, Any]]:
    is_agent = rng.random() < AGENT_SHARE
    assistant = 0 if is_agent else rng.randrange(1, len(SYSTEM_TOKENS))
    shared = SYSTEM_TOKENS[assistant]
    length = shared + draw(rng, FIRST_MESSAGE)
    while at_s < DURATION_S and length <= MOST_INPUT_TOKENS:
        answer = draw(rng, ANSWER)
        yield {
            "timestamp": round(1000 * at_s),
            "input_length": length,
            "output_length": answer,
            "hash_ids": ids.of(f"assistant {assistant}", shared, name, length),
        }
        if rng.random() >= ANOTHER_TURN_SHARE:
            return
        at_s += rng.expovariate(1 / PAUSE_S)
        length += answer + draw(rng, NEXT_MESSAGE)


def draw(rng: Random, law: tuple[float, float]) -> int:
    median, sigma = law
    return max(1, round(median * rng.lognormvariate(0.0, sigma)))


class BlockIds:
    """Hands out ids in the order in which new blocks appear, as a recorder would."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], int] = {}

    def of(self, assistant: str, num_shared: int, conversation: str, num_tokens: int) -> list[int]:
        """Whole blocks of the shared beginning are everybody's; those after it are the conversation's, and the last,
        when it is not full, is of this request's length only."""
        found = []
        for start in range(0, num_tokens, BLOCK_TOKENS):
            end = min(start + BLOCK_TOKENS, num_tokens)
            key = (assistant if end <= num_shared else conversation, start, end)
            found.append(self._known.setdefault(key, len(self._known)))
        return found


if __name__ == "__main__":
    main()
