"""Reading calls from an answer while it is written: text in, content and pieces of calls out.

Knows the marks around calls and the JSON of one. Does not know tokens, grammars or OpenAI's JSON. Pure, and it does not
matter how the text is cut into pieces: what comes out adds up to the same.

    text ─▶ [thoughts] ─▶ outside ──mark──▶ head ──name──▶ arguments ─▶ tail ─▶ after ─▶ outside

A call is told of as soon as its name is known and its arguments begin. Until then it may turn out to be none: what is
no JSON, or calls what nobody offered, comes out as the content that it is. Blanks between content and calls belong to
neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from packlight.router.thinking import THOUGHT_TAGS
from packlight.router.tools.calls import CallDelta, Heard, begun_call, call_id, is_another_object, parsed_call
from packlight.router.tools.nesting import Nesting, Place


@dataclass(frozen=True, slots=True)
class Reading:
    """What stands around calls, as in `CallFormat`. `marks` are those that are tokens without a text."""

    opening: str
    closing: str = ""
    is_list: bool = False
    marks: Mapping[int, str] = field(default_factory=dict)


class CallReader:
    """Reads one answer. `names` are the functions there are; `seed` is what ids are made of, so that two readers of one
    answer name its calls alike.

    `thought` is the tag that will end the thoughts in which the answer begins, if it does. `most_calls`: after so many
    calls, `is_done`."""

    def __init__(
        self, reading: Reading, names: Collection[str], seed: str, *, thought: str = "", most_calls: int | None = None
    ) -> None:
        self._reading, self._names, self._seed, self._most = reading, names, seed, most_calls
        self._outside = self._text if reading.opening else self._bare
        self._state: Callable[[], bool] = self._thought if thought else self._start
        self._thought_end = thought
        self._rest = ""  # what no state has taken yet
        self._looked_at = 0  # how much of it `_nesting` has seen
        self._nesting = Nesting()
        self._undone = ""  # what was taken for the beginning of a call
        self._blank = ""  # blanks that are content if content follows
        self._content: list[str] = []
        self._calls: list[CallDelta] = []
        self.num_calls = 0
        self.is_done = False

    @property
    def marks(self) -> Mapping[int, str]:
        return self._reading.marks

    def push(self, text: str) -> Heard:
        """What is certain, now that the answer goes on with `text`."""
        if not self.is_done:
            self._rest += text
            self._run()
        return self._take()

    def finish(self) -> Heard:
        """What was held back, when no more will come. Half a head is content; half the arguments are arguments."""
        while not self.is_done and self._state in (self._begin, self._head):
            self._no_call()
            self._run()
        if self._state in (self._start, self._thought, self._text, self._bare, self._plain):
            self._say(self._rest)
        if not self.num_calls:
            self._content.append(self._blank)
        self._rest = self._blank = ""
        return self._take()

    def _run(self) -> None:
        """States take what they can from `_rest`, and say whether there is another one to go on with."""
        while not self.is_done and self._state():
            pass

    def _take(self) -> Heard:
        heard = Heard("".join(self._content), tuple(self._calls))
        self._content, self._calls = [], []
        return heard

    # ── outside of calls ─────────────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> bool:
        text = self._rest.lstrip()
        for opened, closed in THOUGHT_TAGS:
            if text.startswith(opened):
                self._thought_end = closed
                return self._go(self._thought)
        if any(opened.startswith(text) for opened, _ in THOUGHT_TAGS):
            return False
        return self._go(self._outside)

    def _thought(self) -> bool:
        at = self._rest.find(self._thought_end)
        if at < 0:
            self._say(self._cut(len(self._rest) - _overlap(self._rest, self._thought_end)))
            return False
        self._say(self._cut(at + len(self._thought_end)))
        return self._go(self._outside)

    def _text(self) -> bool:
        opening = self._reading.opening
        at = self._rest.find(opening)
        if at < 0:
            self._say(self._cut(len(self._rest) - _overlap(self._rest, opening)))
            return False
        self._say(self._cut(at))
        self._undone = self._cut(len(opening))
        return self._go(self._begin)

    def _bare(self) -> bool:
        text = self._rest.lstrip()
        if text:
            return self._go(self._head if text[0] == "{" else self._plain)
        return False

    def _plain(self) -> bool:
        self._say(self._cut(len(self._rest)))
        return False

    # ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self) -> bool:
        if not self._reading.is_list:
            return self._go(self._head)
        text = self._rest.lstrip()
        if not text:
            return False
        if text[0] != "[":
            return self._no_call()
        self._undone += self._cut(self._rest.index("[") + 1)
        return self._go(self._head)

    def _head(self) -> bool:
        begun = begun_call(self._rest)
        if begun is None:
            return self._no_call() if is_another_object(self._rest) else self._head_in_other_order()
        name, num_chars = begun
        if name not in self._names:
            return self._no_call()
        self._cut(num_chars)
        self._call(name)
        return self._go(self._arguments)

    def _head_in_other_order(self) -> bool:
        """Nothing can be told of it before it is complete."""
        place = self._look()
        if place is Place.END:
            call = parsed_call(self._rest[: self._looked_at], self._names)
            if call is None:
                return self._no_call()
            self._cut(self._looked_at)
            self._call(*call)
            return self._go(self._after)
        return place is Place.NOT_JSON and self._no_call()

    def _arguments(self) -> bool:
        place = self._look(until=self._reading.closing[:1])
        if arguments := self._cut(self._looked_at):
            self._tell(CallDelta(self.num_calls - 1, arguments))
        if place is Place.END:
            return self._go(self._tail, Nesting(1))
        return place is Place.NOT_JSON and self._go(self._after)

    def _tail(self) -> bool:
        """What else the call's object has means nothing."""
        place = self._look()
        self._cut(self._looked_at)
        return place in (Place.END, Place.NOT_JSON) and self._go(self._after)

    def _after(self) -> bool:
        if not self._reading.is_list:
            return self._go(self._closing)
        text = self._rest.lstrip()
        if not text:
            return False
        if text[0] == ",":
            self._undone = self._cut(self._rest.index(",") + 1)
            return self._go(self._head)
        if text[0] == "]":
            self._cut(self._rest.index("]") + 1)
        return self._go(self._closing)

    def _closing(self) -> bool:
        closing, text = self._reading.closing, self._rest.lstrip()
        if closing:
            if text.startswith(closing):
                self._cut(len(self._rest) - len(text) + len(closing))
            elif closing.startswith(text):
                return False
        return self._go(self._outside)

    # ── what states are made of ──────────────────────────────────────────────────────────────────────────────────

    def _go(self, state: Callable[[], bool], nesting: Nesting | None = None) -> bool:
        if state == self._after and self.num_calls == self._most:
            self.is_done = True
        self._state, self._nesting, self._looked_at = state, nesting or Nesting(), 0
        return True

    def _no_call(self) -> bool:
        """It only looked like one: the mark is content, and what follows is read as if there had been none."""
        self._say(self._undone)
        self._undone = ""
        return self._go(self._text if self._reading.opening else self._plain)

    def _call(self, name: str, arguments: str = "") -> None:
        index, self.num_calls = self.num_calls, self.num_calls + 1
        self._undone = self._blank = ""
        self._tell(CallDelta(index, arguments, call_id(self._seed, index), name))

    def _tell(self, delta: CallDelta) -> None:
        """Some clients take only one piece of a call at a time."""
        if self._calls and self._calls[-1].index == delta.index:
            delta = self._calls.pop().followed_by(delta)
        self._calls.append(delta)

    def _say(self, text: str) -> None:
        text = self._blank + text
        shown = text.rstrip()
        self._content.append(shown)
        self._blank = text[len(shown) :]

    def _cut(self, num_chars: int) -> str:
        taken, self._rest, self._looked_at = self._rest[:num_chars], self._rest[num_chars:], 0
        return taken

    def _look(self, *, until: str | None = None) -> Place:
        """Looks at what has not been looked at, up to where the object ends or turns out to be none. With `until`, only
        that character shows it is none."""
        place = Place.INSIDE
        for char in self._rest[self._looked_at :]:
            place = self._nesting.feed(char)
            if place is Place.NOT_JSON and until is not None and char != until:
                place = Place.INSIDE
            if place is Place.NOT_JSON:
                break
            self._looked_at += 1
            if place is Place.END:
                break
        return place


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((num for num in range(longest, 0, -1) if mark.startswith(text[-num:])), 0)
