"""The radix cache of exact KV on one prefill worker: which block holds which page of which prompt prefix.

Knows chained page hashes (a hash names the whole prefix up to its page), blocks and their order of use. Does not know
tokens, tensors or other workers.

One node per page; a path from the root is a prefix. A prompt of pages a b c that shares a b with an earlier a b d:

    root ─ a ─ b ─┬─ c
                  └─ d          match([a, b, e]) == blocks of a, b

Who holds a block: every request that uses it has one reference in the PageBook; the tree keeps it beyond that. Eviction
takes the least recently used leaf that no request holds, so a prefix never loses its middle.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from packlight.core.errors import InternalError
from packlight.core.hashing import PageHash
from packlight.kv.pages import PageBook, PageIds


@dataclass(slots=True, eq=False)
class Node:
    page_hash: PageHash
    block: int
    parent: Node | None
    depth: int
    last_used: int = 0
    children: dict[PageHash, Node] = field(default_factory=dict)

    def path(self) -> list[PageHash]:
        hashes: list[PageHash] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            hashes.append(node.page_hash)
            node = node.parent
        return hashes[::-1]


@dataclass(slots=True)
class Eviction:
    """Of the prefix `hashes` only the first `keep` pages are left (and nothing that continues them there)."""

    hashes: list[PageHash]
    keep: int


class RadixCache:
    """A prefix tree over page hashes whose nodes keep blocks of `book`. Not thread-safe: one owner calls it."""

    def __init__(self, book: PageBook) -> None:
        self._book = book
        self._root = Node(b"", -1, None, 0)
        self._clock = 0

    def match(self, hashes: Sequence[PageHash]) -> PageIds:
        """The blocks of the longest cached prefix of `hashes`, marked as just used. The caller must `share` them."""
        self._clock += 1
        node, blocks = self._root, []
        for page_hash in hashes:
            child = node.children.get(page_hash)
            if child is None:
                break
            child.last_used = self._clock
            blocks.append(child.block)
            node = child
        return np.array(blocks, dtype=np.int32)

    def insert(self, hashes: Sequence[PageHash], blocks: PageIds) -> PageIds:
        """Keep `blocks`, which the caller holds, as the pages of the prefix `hashes`; return the tree's block of each
        page. Where another request stored the same page first, that block is returned and the caller's is not kept."""
        self._clock += 1
        node, kept = self._root, []
        for page_hash, block in zip(hashes, blocks.tolist(), strict=True):
            child = node.children.get(page_hash)
            if child is None:
                child = Node(page_hash, block, node, node.depth + 1)
                node.children[page_hash] = child
                self._book.keep(block)
            child.last_used = self._clock
            kept.append(child.block)
            node = child
        return np.array(kept, dtype=np.int32)

    def evict(self, num_blocks: int) -> list[Eviction]:
        """Free up to `num_blocks` idle blocks, least recently used leaves first. Returns what was lost."""
        heap = [(node.last_used, id(node), node) for node in self._nodes() if self._evictable(node)]
        heapq.heapify(heap)
        growing: dict[Node, Eviction] = {}  # by the node above the lost pages: it may be next
        lost: list[Eviction] = []
        while heap and num_blocks > 0:
            _, _, node = heapq.heappop(heap)
            num_blocks -= 1
            eviction = growing.pop(node, None)
            if eviction is None:
                eviction = Eviction(node.path(), node.depth)
                lost.append(eviction)
            parent = self._unlink(node)
            eviction.keep = parent.depth
            growing.setdefault(parent, eviction)
            if self._evictable(parent):
                heapq.heappush(heap, (parent.last_used, id(parent), parent))
        return lost

    def prefixes(self) -> Iterator[list[PageHash]]:
        """Every maximal prefix held: the inventory to publish."""
        return (node.path() for node in self._nodes() if not node.children)

    def check(self) -> None:
        """Raise InternalError if a block is in the tree twice or is not kept by the books."""
        blocks = [node.block for node in self._nodes()]
        self._book.check()
        if len(set(blocks)) != len(blocks) or self._book.num_kept != len(blocks):
            raise InternalError(f"radix cache: {len(blocks)} nodes, {self._book.num_kept} blocks kept in the books")

    def _unlink(self, leaf: Node) -> Node:
        assert leaf.parent is not None
        del leaf.parent.children[leaf.page_hash]
        self._book.drop(leaf.block)
        return leaf.parent

    def _evictable(self, node: Node) -> bool:
        return node.parent is not None and not node.children and self._book.is_idle(node.block)

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node
