"""The prefix tree alone: paths spell prompts, keys and values stay with their tokens, pages are counted."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.engine.pool import Geometry, KVPool
from alignpro.engine.prefix_tree import MIN_NODE_TOKENS, Node, PrefixTree
from alignpro_kernels import read_kv, write_kv

GEOMETRY = Geometry(((2, 4), (1, 4)), torch.float32)


def make(pages: int, page_tokens: int) -> PrefixTree:
    return PrefixTree(
        KVPool({"m": GEOMETRY, "lora": GEOMETRY}, torch.device("cpu"), total=pages, page_tokens=page_tokens)
    )


def mark(path: list[Node], heads: int) -> torch.Tensor:
    """Return stand-ins for the keys of a path's tokens: numbers that identify the prefix and the nodes' models."""
    tokens = tuple((token, each.model == "m") for each in path for token in each.tokens)
    values = [float(hash(tokens[: i + 1]) % 100_003) for i in range(len(tokens))]
    return torch.tensor(values)[:, None, None].expand(-1, heads, 4)


def compute(tree: PrefixTree, node: Node) -> None:
    """Write the keys and values of a path's tokens, as a forward pass would."""
    path = node.path()
    for each in path:
        count = len(each.tokens) - each.computed
        slots = torch.tensor(tree.pool.slots("m", each.pages, each.computed, count), dtype=torch.int64)
        first = each.start + each.computed
        for pages in tree.pool.layers("m"):
            states = mark(path, pages.shape[3])[first : first + count].contiguous()
            write_kv(states, -states, pages, slots)
        each.computed = len(each.tokens)


def check(tree: PrefixTree, held: list[Node]) -> None:
    nodes = list(tree.nodes("m"))
    assert tree.pool.num_free + tree.num_cached + tree.num_locked == tree.pool.total
    assert tree.num_cached == sum(len(node.pages) for node in nodes if not node.locks)
    locks = Counter(each for node in held for each in node.path())
    for node in nodes:
        assert node.locks == locks[node]
        assert len(node.pages) == tree.pool.pages_for("m", len(node.tokens))
        assert node.parent is not None
        assert node.start == node.parent.start + len(node.parent.tokens)
        slots = torch.tensor(tree.pool.slots("m", node.pages, 0, node.computed), dtype=torch.int64)
        for pages in tree.pool.layers("m"):
            keys, values = read_kv(pages, slots)
            assert torch.equal(keys, mark(node.path(), pages.shape[3])[node.start : node.start + node.computed])
            assert torch.equal(values, -keys)
    pages = [page for node in nodes for page in node.pages]
    assert len(set(pages)) == len(pages)


prompts = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 24)), min_size=1, max_size=4).map(
    lambda runs: tuple(token for token, length in runs for _ in range(length))
)


@given(
    st.integers(4, 60),
    st.sampled_from([1, 4, 7, 32]),
    st.lists(
        st.tuples(prompts, st.none() | st.integers(0, 40), st.sampled_from(["compute", "hold", "release", "evict"])),
        max_size=30,
    ),
)
@settings(max_examples=60)
def test_any_order_of_uses(pages: int, page_tokens: int, uses: list[tuple[tuple[int, ...], int | None, str]]) -> None:
    """Also with a LoRA that acts on the end of a prompt, while the first tokens belong to its base model."""
    tree = make(pages, page_tokens)
    held: list[Node] = []
    for prompt, shared, then in uses:
        if shared is None:
            node = tree.acquire("m", prompt)
        else:
            shared = min(shared, len(prompt) - 1)
            node = tree.acquire("lora", prompt, "m", shared)
            assert node is None or sum(len(each.tokens) for each in node.path() if each.model == "m") == shared
        if node is None:
            assert tree.pool.num_free + tree.num_cached < tree.pool.pages_for("m", len(prompt)) + 2
        else:
            assert tuple(token for each in node.path() for token in each.tokens) == prompt
            held.append(node)
            if then == "compute":
                compute(tree, node)
        check(tree, held)
        if then == "release" and held:
            tree.release(held.pop(0))
        if then == "evict":
            tree.evict_all()
            assert tree.num_cached == 0
        check(tree, held)
    while held:
        tree.release(held.pop())
    check(tree, held)
    base = [node for node in tree.nodes("m") if node.model == "m"]
    tree.drop("lora")
    check(tree, held)
    assert list(tree.nodes("m")) == base
    tree.evict_all()
    assert tree.pool.num_free == tree.pool.total


def test_a_models_nodes_are_dropped_with_their_subtrees_when_its_weights_change() -> None:
    tree = make(100, 4)
    nodes = [tree.acquire("m", (1, 2, 3)), tree.acquire("lora", (1, 2, 3, 4), "m", 3), tree.acquire("lora", (1, 2, 3))]
    for node in nodes:
        assert node is not None
        tree.release(node)
    assert tree.pool.used == {"m": 1, "lora": 2}
    tree.drop("m")
    assert tree.pool.used == {"m": 0, "lora": 1}


def test_prompts_that_diverge_within_a_page_share_the_tokens_before() -> None:
    tree = make(100, 16)
    common = tuple(range(37))
    first = tree.acquire("m", (*common, 1, 2, 3))
    assert first is not None
    compute(tree, first)
    second = tree.acquire("m", (*common, 4))
    assert second is not None
    assert [(len(node.tokens), node.complete) for node in second.path()] == [(37, True), (1, False)]
    assert [(len(node.tokens), node.complete) for node in first.path()] == [(37, True), (3, True)]
    check(tree, [first, second])


def test_a_few_common_tokens_are_not_worth_a_node() -> None:
    tree = make(100, 16)
    common = tuple(range(MIN_NODE_TOKENS - 1))
    nodes = [tree.acquire("m", (*common, 100 + i, *range(20))) for i in range(3)]
    assert [len(node.path()) for node in nodes if node] == [1, 1, 1]


def test_the_least_recently_used_is_evicted_first() -> None:
    tree = make(4, 16)
    prompts = [tuple(range(i, i + 16)) for i in range(0, 500, 100)]
    for prompt in (*prompts[:4], prompts[0]):  # the first is used again
        node = tree.acquire("m", prompt)
        assert node is not None
        tree.release(node)
    node = tree.acquire("m", prompts[4])
    assert node is not None
    assert {each.tokens for each in tree.nodes("m")} == {prompts[i] for i in (0, 2, 3, 4)}
