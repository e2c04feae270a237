"""Who uses which block: sharing, waiting, eviction."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.infer.blocks import Blocks, block_key
from nanovlm.model.cache_attention import BLOCK


def test_a_prefix_that_is_kept_is_not_free_for_its_own_suffix():
    """Of four blocks, two are kept and shared: a row of five does not fit, though four are free before."""
    blocks, keys = Blocks(4), [b"a", b"b"]
    first = blocks.take(keys, 2)
    for block in first:
        block.is_filled = True
    blocks.release(first, None)
    assert blocks.num_free == 4 and blocks.take(keys, 5) is None
    assert blocks.num_free == 4 and not any(block.num_users for block in blocks.all)
    again = blocks.take(keys, 4)
    assert again[:2] == first and blocks.num_free == 0


def test_keys_tell_contents_and_what_is_before():
    ids = list(range(BLOCK))
    keys = [
        block_key(b"", ids, []),
        block_key(b"x" * 32, ids, []),
        block_key(b"", [*ids[:-1], 99], []),
        block_key(b"", ids, [b"t" * 32]),
        block_key(b"", ids, [b"u" * 32]),
        block_key(b"", ids, [b"t" * 32, b"u" * 32]),
    ]
    assert len(set(keys)) == len(keys) and block_key(b"", ids, []) == keys[0]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_counts_add_up(data):
    """Rows take prefixes out of few keys, fill some blocks, and go, in any order."""
    blocks, rows = Blocks(data.draw(st.integers(1, 12)), data.draw(st.booleans())), []
    for _ in range(data.draw(st.integers(1, 30))):
        if rows and data.draw(st.booleans()):
            taken, user = rows.pop(data.draw(st.integers(0, len(rows) - 1)))
            for block in taken[: data.draw(st.integers(0, len(taken)))]:
                if block.writer in (None, user):
                    block.is_filled, block.writer = True, None
            blocks.release(taken, user)
            continue
        number = data.draw(st.integers(1, 6))
        keys = [bytes([data.draw(st.integers(0, 1)), i]) for i in range(data.draw(st.integers(0, number)))]
        free = blocks.num_free
        if (taken := blocks.take(keys, number)) is None:
            assert blocks.num_free == free < number
            continue
        user = object()
        for block in taken:
            if block.writer is None and not block.is_filled:
                block.writer = user
        assert len({block.number for block in taken}) == number
        rows.append((taken, user))
        used = [block.number for taken, _ in rows for block in taken]
        assert [block.num_users for block in blocks.all] == [used.count(i) for i in range(len(blocks.all))]
        assert blocks.num_free == len(blocks.all) - len(set(used))
        assert not {*blocks.kept} & set(used) and all(blocks.found[b.key] is b for b in blocks.all if b.key)
