"""A radix tree with compressed edges over page hashes: who holds how much of a path. Pure and synchronous.

Knows integers and 16-byte digests. Does not know where it is kept: `scripts/radix.lua` is this file again, in Redis.

Three facts about chained hashes and prefix caches carry the design:

1. A page's hash names the whole prefix up to that page. So the first hash of an edge is the node's identity, a child is
   found in one flat table by the next hash of the path, and two paths that agree on a page agree on all before it:
   how far a path follows an edge takes one comparison when it follows it to the end, a bisection otherwise.
2. A holder that has a page has all pages before it. So a claim on a node is one number, how far along its edge, and it
   counts only if the holder has the whole edges above. When a holder loses a page, shortening one claim is enough:
   those below are cut off. Stamps keep them from coming back with the page: a claim remembers when it was last made
   (`seen`) and since when it covers the whole edge (`since`); below a claim only those count that were made since then.
   Inserting and removing cost O(length of the path), however large the tree below it is.
3. A holder's life is a *slot*, a number never used twice. Claims belong to slots; a holder that is dropped or restarted
   gets a new one, which kills all its claims in O(1). Dead claims are swept when their node is next written.

Because a claim is never older than its node, and a cut-off node's claims are older than anything built above it later,
any node may be deleted at any time: the least recently used go first, and nothing needs to know its children.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from packlight.core.hashing import PageHash
from packlight.core.workers import WorkerId
from packlight.prefix.base import Holder

Slot = int


@dataclass(slots=True)
class Claim:
    """`num_held` pages of an edge, last claimed at tick `seen`; covering the whole edge since tick `since`."""

    num_held: int
    since: int
    seen: int


@dataclass(slots=True)
class Node:
    edge: Sequence[PageHash]
    claims: dict[Slot, Claim] = field(default_factory=dict)


@dataclass(slots=True)
class _Life:
    """The newest known generation of a worker, and its slot unless it was dropped."""

    generation: int
    slot: Slot | None


class RadixTree:
    """The index of one model, `max_nodes` nodes at most."""

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self._nodes: OrderedDict[PageHash, Node] = OrderedDict()  # by first hash; least recently used first
        self._lives: dict[WorkerId, _Life] = {}
        self._workers: dict[Slot, WorkerId] = {}  # living slots only
        self._num_slots = 0
        self._tick = 0

    def enroll(self, holder: Holder) -> Slot | None:
        """The holder's slot, a new one if it had none. None if a newer generation of the worker is known."""
        life = self._lives.get(holder.worker_id)
        if life is not None and life.generation > holder.generation:
            return None
        if life is not None and life.generation == holder.generation and life.slot is not None:
            return life.slot
        self.drop(holder.worker_id, holder.generation)
        self._num_slots += 1
        self._lives[holder.worker_id] = _Life(holder.generation, self._num_slots)
        self._workers[self._num_slots] = holder.worker_id
        return self._num_slots

    def drop(self, worker_id: WorkerId, generation: int) -> None:
        """Kill the claims of this generation and older ones."""
        life = self._lives.get(worker_id)
        if life is not None and life.generation > generation:
            return
        if life is not None and life.slot is not None:
            del self._workers[life.slot]
        self._lives[worker_id] = _Life(generation, None)

    def match(self, hashes: Sequence[PageHash]) -> dict[WorkerId, int]:
        """The number of leading pages each worker holds, workers with none left out."""
        num_held: dict[Slot, int] = {}
        path: list[Node] = []
        reach: dict[Slot, int] | None = None
        position = 0
        while position < len(hashes) and (node := self._nodes.get(hashes[position])):
            num_common = _num_common(node.edge, hashes, position)
            valid = self._valid_claims(node, reach)
            num_held.update((slot, position + min(claim.num_held, num_common)) for slot, claim in valid.items())
            if valid:
                path.append(node)
            if not valid or num_common < len(node.edge):
                break
            reach = {slot: claim.since for slot, claim in valid.items() if claim.num_held == len(node.edge)}
            position += num_common
        self._touch(path)
        return {self._workers[slot]: num_pages for slot, num_pages in num_held.items()}

    def insert(self, holder: Holder, hashes: Sequence[PageHash]) -> None:
        """The holder has all of this path."""
        slot = self.enroll(holder)
        if slot is None:
            return
        self._tick += 1
        path: list[Node] = []
        position, since = 0, 0
        while position < len(hashes):
            node = self._nodes.get(hashes[position]) or self._add(hashes[position:])
            num_common = _num_common(node.edge, hashes, position)
            position += num_common
            if num_common < len(node.edge) and position < len(hashes):
                self._split(node, num_common)
            since = self._claim(node, slot, num_common, since)
            path.append(node)
        self._touch(path)
        while len(self._nodes) > self._max_nodes:
            self._nodes.popitem(last=False)

    def remove(self, holder: Holder, hashes: Sequence[PageHash], keep: int) -> None:
        """The holder has lost page `hashes[keep]` and every path through it."""
        slot = self.enroll(holder)
        position = 0
        while slot is not None and position <= keep < len(hashes) and (node := self._nodes.get(hashes[position])):
            num_common = _num_common(node.edge, hashes, position)
            if keep < position + num_common:
                self._shorten(node, slot, keep - position)
            if num_common < len(node.edge):
                break
            position += num_common

    def _valid_claims(self, node: Node, reach: dict[Slot, int] | None) -> dict[Slot, Claim]:
        """The claims that count, given since when each slot has held all pages above the node (None: at the root)."""
        if reach is None:
            return {slot: claim for slot, claim in node.claims.items() if slot in self._workers}
        return {slot: claim for slot, claim in node.claims.items() if slot in reach and claim.seen >= reach[slot]}

    def _claim(self, node: Node, slot: Slot, num_pages: int, since_above: int) -> int:
        """Claim the first `num_pages` of the edge now. Returns since when the slot has held all of it."""
        node.claims = {other: claim for other, claim in node.claims.items() if other in self._workers}
        claim = node.claims.get(slot)
        if claim is None or claim.seen < since_above:
            claim = node.claims[slot] = Claim(0, self._tick, self._tick)
        if claim.num_held < len(node.edge):
            claim.since = self._tick
        claim.num_held = max(claim.num_held, num_pages)
        claim.seen = self._tick
        return claim.since

    def _shorten(self, node: Node, slot: Slot, num_pages: int) -> None:
        claim = node.claims.get(slot)
        if claim is None or claim.num_held <= num_pages:
            return
        claim.num_held = num_pages
        if num_pages == 0:
            del node.claims[slot]
        if not node.claims:
            del self._nodes[node.edge[0]]

    def _split(self, node: Node, num_upper: int) -> None:
        """Cut the edge after `num_upper` pages: the node keeps the upper part, a new one gets the rest."""
        lower: dict[Slot, Claim] = {}
        for slot, claim in node.claims.items():
            if claim.num_held > num_upper:
                lower[slot] = Claim(claim.num_held - num_upper, claim.since, claim.seen)
            claim.num_held = min(claim.num_held, num_upper)
        if lower:
            self._add(node.edge[num_upper:]).claims = lower
        node.edge = node.edge[:num_upper]

    def _add(self, edge: Sequence[PageHash]) -> Node:
        node = self._nodes[edge[0]] = Node(tuple(edge))
        self._nodes.move_to_end(edge[0])  # a node of that name may have been left behind, cut off from the root
        return node

    def _touch(self, path: Sequence[Node]) -> None:
        """Make the nodes of a path the most recently used: a parent is never older than its child."""
        for node in reversed(path):
            self._nodes.move_to_end(node.edge[0])


def _num_common(edge: Sequence[PageHash], hashes: Sequence[PageHash], start: int) -> int:
    """How many pages of `edge` the path follows from `hashes[start]` on, which is `edge[0]`."""
    limit = min(len(edge), len(hashes) - start)
    if edge[limit - 1] == hashes[start + limit - 1]:
        return limit
    return bisect_left(range(limit), True, key=lambda page: edge[page] != hashes[start + page])
