"""The integers that stand in for the mask: they cover it, each pair once, and stay small."""

import pytest
import torch

from csrc_triton.tile_lists import AS_KEY, TO_IMG, TO_TXT
from csrc_triton.tiles import Tile
from sda_fast import ops
from sda_fast.hierarchy import RULES, Hierarchy
from sda_fast.ops import device_tables, joint_lists
from sda_fast.ops.joint_lists import Layout, key_lists, query_lists

CPU = torch.device("cpu")
TILES = [Tile(16, 16, 4, 2, 16), Tile(32, 64, 4, 2, 16), Tile(64, 32, 4, 2, 32)]
TREES = [(3, 2, 1), (4, 0, 1), (0, 0, 1, 1), (16,), (1, 1, 1, 1, 1), (0, 1, 0, 0, 0, 1), (5, 1)]


def random_layout(seed: int, rule: str) -> Layout:
    """A tree, a grid, extra text and a source picture drawn from a seed."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    tokens = TREES[draw(0, len(TREES))]
    source = (draw(1, 9), draw(1, 9)) if draw(0, 2) else ()
    return Layout(
        tokens, draw(1, 14), draw(1, 24), rule, draw(0, 20), draw(0, len(tokens)), source
    )  # fmt: skip


def mask_of(layout: Layout):
    return Hierarchy(layout.tokens_per_node).attention_mask(
        layout.h, layout.w, layout.rule, layout.extra_text, layout.isolate_level,
        layout.source or None,
    )  # fmt: skip


def covered(lists, layout: Layout, step: int, masked: int):
    """[S, S] how often a tile's program comes by each (own token, other token), and how often it
    does so without asking the mask."""
    length, num_txt = layout.length, layout.num_txt
    visits, unasked = torch.zeros(2, length, length, dtype=torch.int64)
    entries = lists.entries.tolist()
    for start, stop, txt, txt_stop, block, block_stop, dense, dense_stop in lists.tiles.tolist():
        assert (start < num_txt) == (stop <= num_txt), "txt and image tokens in one tile"
        assert (dense_stop - dense) % step == 0
        for token in entries[txt:txt_stop]:
            assert token < num_txt
            visits[start:stop, token] += 1
        for first in entries[block:block_stop]:
            last = min(first + masked, num_txt if first < num_txt else length)
            visits[start:stop, first:last] += 1
        visits[start:stop, dense:dense_stop] += 1
        unasked[start:stop, dense:dense_stop] += 1
    assert sorted(t for a, b, *_ in lists.tiles.tolist() for t in range(a, b)) == [*range(length)]
    return visits, unasked


@pytest.mark.parametrize("beyond_dense", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(9))
def test_every_allowed_pair_is_visited_once_and_no_other_without_the_mask(seed, rule, beyond_dense):
    layout = random_layout(seed, rule)
    tile = TILES[seed % len(TILES)]
    mask = mask_of(layout)
    wanted = mask.clone()
    if beyond_dense and layout.dense_from is not None:
        wanted[layout.dense_from :, layout.num_txt :] = False
    by_query = covered(
        query_lists(layout, tile, beyond_dense, CPU), layout, tile.block_n, tile.block_masked
    )
    swapped = Tile(tile.block_n, tile.block_m, 4, 2, 16)
    by_key = [
        t.T
        for t in covered(key_lists(layout, swapped, beyond_dense, CPU), layout, tile.block_n, 16)
    ]
    for visits, unasked in (by_query, by_key):
        assert visits.max() <= 1
        assert (visits[wanted] == 1).all()
        assert mask[unasked.bool()].all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(8))
def test_bits_of_two_tokens_meet_exactly_where_the_mask_is_true(seed, rule):
    layout = random_layout(seed, rule)
    rows, cols = (torch.from_numpy(t) for t in layout.bits())
    num_txt = layout.num_txt
    row, col = [*range(num_txt)], [*range(num_txt)]
    above, beside = num_txt, num_txt
    for height, width in layout.grids:
        row += [above + i // width for i in range(height * width)]
        col += [beside + i % width for i in range(height * width)]
        above, beside = above + height, beside + width
    rows, cols = rows[:, row], cols[:, col]
    for role, keys in ((TO_TXT, slice(0, num_txt)), (TO_IMG, slice(num_txt, None))):
        meet = (rows[role][:, None] & rows[AS_KEY][None, keys]) != 0
        meet &= (cols[role][:, None] & cols[AS_KEY][None, keys]) != 0
        assert torch.equal(meet, mask_of(layout)[:, keys])


def test_lists_are_kept_and_their_number_is_bounded():
    joint_lists._query_lists.cache_clear()
    layout = random_layout(0, "local")
    first = query_lists(layout, TILES[0], False, CPU)
    assert query_lists(layout, TILES[0], False, CPU) is first
    for w in range(1, joint_lists.CACHED + 20):
        query_lists(Layout((1, 1), 1, w, "overlap", 0, 1, ()), TILES[0], False, CPU)
    assert joint_lists._query_lists.cache_info().currsize == joint_lists.CACHED


@pytest.mark.parametrize(("side", "limit"), [(32, 64 << 10), (64, 64 << 10), (128, 256 << 10)])
def test_what_replaces_the_mask_is_small_for_real_pictures(side, limit):
    """512, 1024 and 2048 pixels, forward and backward together."""
    tree = Hierarchy((32, 8, 4))
    q = torch.empty(1, tree.num_tokens + side**2, 24, 128, dtype=torch.bfloat16, device="meta")
    for implementation in ("auto", *ops.IMPLEMENTATIONS):
        assert ops.mask_bytes(q, tree, side, side, implementation=implementation) <= limit


def test_nothing_of_the_size_of_the_mask_is_made_on_the_way(monkeypatch):
    """Neither S x S nor N_txt x S_img, in numpy or in torch, while lists are built."""
    layout = Layout((32, 8, 4), 64, 64, "local", 0, 2, ())
    largest = 0

    meet = joint_lists._meet

    def watched(a, b):
        nonlocal largest
        found = meet(a, b)
        largest = max(largest, found.size)
        return found

    monkeypatch.setattr(joint_lists, "_meet", watched)
    joint_lists._query_lists.cache_clear()
    joint_lists._key_lists.cache_clear()
    query_lists(layout, Tile(128, 128, 8, 2, 64), False, CPU)
    key_lists(layout, Tile(32, 128, 8, 2, 32), False, CPU)
    assert 0 < largest < layout.num_txt * layout.num_img


def test_blocks_that_do_not_divide_a_step_are_refused():
    with pytest.raises(ValueError, match="block_masked must divide the 16 tokens of a step"):
        query_lists(random_layout(0, "local"), Tile(16, 16, 4, 1), False, CPU)


def test_lists_first_needed_inside_a_captured_graph_are_refused(monkeypatch):
    monkeypatch.setattr(device_tables, "capturing", lambda: True)
    joint_lists._query_lists.cache_clear()
    layout = random_layout(3, "overlap")
    with pytest.raises(RuntimeError, match="must run once with these sizes before a CUDA graph"):
        query_lists(layout, TILES[0], False, CPU)


def test_lists_that_a_graph_was_captured_with_outlive_the_cache(monkeypatch):
    layout = random_layout(4, "overlap")
    lists = query_lists(layout, TILES[0], False, CPU)
    monkeypatch.setattr(device_tables, "capturing", lambda: True)
    query_lists(layout, TILES[0], False, CPU)
    joint_lists._query_lists.cache_clear()
    at = lists.shape.untyped_storage().data_ptr()
    assert at in device_tables._captured
    for table in (lists.row_bits, lists.col_bits, lists.tiles, lists.entries):
        assert table.untyped_storage().data_ptr() == at
