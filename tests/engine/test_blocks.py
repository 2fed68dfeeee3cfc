"""The block pool: references, reuse, and content that is found again."""

from __future__ import annotations

from saccade.engine.blocks import BlockPool, block_key


def test_a_block_is_free_again_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2, 16)
    block = pool.allocate()
    pool.hold(block)
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2


def test_published_content_is_found_until_its_block_is_handed_out_again() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(), pool.allocate()
    keys = [b"a", b"b"]
    pool.publish(first, keys[0])
    pool.publish(second, keys[1])
    pool.release([first, second])
    assert pool.find(keys) == [first, second]
    # The end of a sequence is reused first, so that its beginning is found longest.
    assert pool.allocate() == second
    assert pool.find(keys) == [first]
    assert pool.allocate() == first
    assert pool.find(keys) == []


def test_a_found_block_that_is_held_is_not_handed_out() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.publish(block, b"a")
    pool.release([block])
    for found in pool.find([b"a"]):
        pool.hold(found)
    assert pool.allocate() != block
    assert pool.num_free == 0


def test_only_an_unbroken_prefix_is_found() -> None:
    pool = BlockPool(3, 4)
    blocks = [pool.allocate() for _ in range(3)]
    pool.publish(blocks[0], b"a")
    pool.publish(blocks[2], b"c")
    assert pool.find([b"a", b"b", b"c"]) == [blocks[0]]


def test_the_same_ids_with_another_picture_have_another_key() -> None:
    ids = [7] * 16
    first = block_key(b"", ids, [(0, b"cat")])
    assert first == block_key(b"", ids, [(0, b"cat")])
    assert first != block_key(b"", ids, [(0, b"dog")])
    assert first != block_key(b"", ids, [(4, b"cat")])
    assert first != block_key(b"before", ids, [(0, b"cat")])
