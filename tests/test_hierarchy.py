"""The tree and its masks against geometry in exact fractions, written without the integer rule."""

import json
import random
from fractions import Fraction

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sda_fast.coords import patch_coords
from sda_fast.hierarchy import RULES, Hierarchy

UNIT = (Fraction(0), Fraction(0), Fraction(1), Fraction(1))


def nodes_by_geometry(tree):
    """(path, box, first position) of every node in the order of the positions, by descent."""

    def descend(path, box, depth):
        found[depth].append((path, box))
        if depth + 1 < tree.num_levels:
            y0, x0, y1, x1 = box
            ym, xm = (y0 + y1) / 2, (x0 + x1) / 2
            quarters = [(y0, x0, ym, xm), (y0, xm, ym, x1), (ym, x0, y1, xm), (ym, xm, y1, x1)]
            for child, quarter in enumerate(quarters):
                descend(f"{path.rstrip('/')}/{child}", quarter, depth + 1)

    found = [[] for _ in range(tree.num_levels)]
    descend("/", UNIT, 0)
    listed, start = [], 0
    for level, count in zip(found, tree.tokens_per_node, strict=True):
        for path, box in sorted(level, key=lambda entry: entry[1][:2]):
            listed.append((path, box, start, count))
            start += count
    return listed


def patches_by_geometry(h, w):
    return [
        (Fraction(y, h), Fraction(x, w), Fraction(y + 1, h), Fraction(x + 1, w))
        for y in range(h)
        for x in range(w)
    ]


def touch(a, b):
    """Two rectangles share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def kin(a, b):
    a, b = a.rstrip("/") + "/", b.rstrip("/") + "/"
    return a.startswith(b) or b.startswith(a)


def mask_by_geometry(tree, grids, rule, extra_text, isolate_level):
    nodes = nodes_by_geometry(tree)
    owner = [n for n, (_, _, _, count) in enumerate(nodes) for _ in range(count)]
    owner += [0] * extra_text  # an extra token is one more of the root's
    patches = [patch for grid in grids for patch in patches_by_geometry(*grid)]
    num_txt, num_img = len(owner), len(patches)
    own = torch.tensor([[touch(patch, box) for _, box, _, _ in nodes] for patch in patches])

    mask = torch.ones(num_txt + num_img, num_txt + num_img, dtype=torch.bool)
    mask[num_txt:, :num_txt] = own[:, owner]
    if rule != "overlap":
        related = torch.tensor([[kin(a[0], b[0]) for a in nodes] for b in nodes])
        mask[:num_txt, :num_txt] = related[owner][:, owner]
        mask[:num_txt, num_txt:] = own[:, owner].T
    if rule == "isolated":
        of_level = [
            n for n, (_, box, *_) in enumerate(nodes) if box[2] - box[0] == 0.5**isolate_level
        ]
        seen = own[:, of_level]
        mask[num_txt:, num_txt:] = (seen[:, None] & seen[None]).any(-1)
    return mask


def random_case(seed):
    draw = random.Random(seed)
    levels = draw.choice([1, 2, 3, 3, 4]) if seed else 6
    counts = [draw.choice([0, 1, 2, 3, 5]) for _ in range(levels - 1)] + [draw.choice([0, 1, 3])]
    tree = Hierarchy(counts if any(counts) else [1, *counts[1:]])
    grids = [(draw.randint(1, 9), draw.randint(1, 9))]
    if draw.random() < 0.5:
        grids.append((draw.randint(1, 5), draw.randint(1, 7)))
    return tree, grids, draw.choice([0, 0, 1, 3]), draw.randrange(levels)


@pytest.mark.parametrize("seed", range(16))
def test_every_mask_is_the_geometry(seed):
    tree, grids, extra_text, isolate_level = random_case(seed)
    (h, w), source = grids[0], grids[1] if len(grids) > 1 else None
    for rule in RULES:
        expected = mask_by_geometry(tree, grids, rule, extra_text, isolate_level)
        actual = tree.attention_mask(h, w, rule, extra_text, isolate_level, source)
        assert actual.dtype == torch.bool
        assert torch.equal(actual, expected), f"{tree} {grids} {rule} {extra_text} {isolate_level}"
    own = mask_by_geometry(tree, grids[:1], "overlap", 0, 0)[tree.num_tokens :, : tree.num_tokens]
    assert torch.equal(tree.overlap(h, w), own)


@pytest.mark.parametrize("counts", [(32, 8, 4), (16,), (0, 0, 3), (3, 0, 1, 2), (1, 0, 2, 0, 1, 1)])
def test_nodes_are_the_geometry(counts):
    tree = Hierarchy(counts)
    expected = nodes_by_geometry(tree)
    assert tree.num_nodes == len(expected)
    assert tree.num_tokens == sum(count for _, _, _, count in expected)
    coords = tree.token_coords()
    for node, (path, box, start, count) in zip(tree.nodes(), expected, strict=True):
        assert node.path == path
        assert tree.node(path) == node
        assert tree.box(path) == box
        assert tree.span(path) == slice(start, start + count)
        here = slice(start, start + count)
        assert tree.token_level[here].eq(node.level).all()
        assert tree.token_row[here].eq(node.row).all()
        assert tree.token_col[here].eq(node.col).all()
        centre = [node.level, 32 * float(box[0] + box[2]), 32 * float(box[1] + box[3])]
        assert torch.equal(coords[here], torch.tensor([centre]).expand(count, 3))
        below = [kin(path, p) and len(p) >= len(path) for p, _, _, c in expected for _ in range(c)]
        assert torch.equal(tree.subtree(path), torch.tensor(below))


def test_the_sizes_the_work_is_known_for():
    sizes = {(16,): 16, (32,): 32, (32, 8): 64, (16, 4, 2): 64, (16, 8, 4): 112, (32, 8, 4): 128}
    assert {counts: Hierarchy(counts).num_tokens for counts in sizes} == sizes
    tree = Hierarchy()
    assert (tree.num_tokens, tree.num_levels, tree.num_nodes) == (128, 3, 21)
    assert tree.span("/1/2") == slice(88, 92)


def test_a_mask_hides_the_published_share_of_the_scores():
    hidden = 1 - Hierarchy().attention_mask(32, 32).float().mean()
    assert hidden == pytest.approx(0.0648, abs=1e-4)


def test_a_straddling_patch_belongs_to_both_nodes():
    tree = Hierarchy((0, 1))
    assert tree.overlap(3, 1).tolist() == [
        [True, True, False, False],
        [True] * 4,
        [False] * 2 + [True] * 2,
    ]
    # 720x1280: 45 rows of patches, the middle one on the border
    assert tree.overlap(45, 80)[22 * 80].tolist() == [True, False, True, False]
    assert tree.overlap(32, 32).sum(1).eq(1).all()


def test_a_mask_belongs_to_the_caller():
    tree = Hierarchy((1, 1))
    for make in (
        lambda: tree.attention_mask(2, 2),
        lambda: tree.overlap(2, 2),
        lambda: tree.token_row,
    ):
        before = make().clone()
        make().zero_()
        assert torch.equal(make(), before)
        assert before.any()


def tables(tree):
    return [
        tree.token_coords(2, 3), patch_coords(2, 3), tree.token_level, tree.token_row,
        tree.token_col, tree.subtree("/1"), tree.overlap(2, 3),
        *(tree.attention_mask(2, 3, rule, 1, source=(1, 2)) for rule in RULES),
    ]  # fmt: skip


@pytest.mark.parametrize("counts", [(2, 0, 3), (1, 4)])
def test_tables_ignore_the_default_device(counts):
    # each tree is asked for the first time here: under the other device, then without
    tree = Hierarchy(counts)
    with torch.device("meta"):
        under = tables(tree)
    after = tables(tree)
    torch.set_default_device("meta")
    try:
        again = tables(tree)
    finally:
        torch.set_default_device(None)
    for a, b, c in zip(under, after, again, strict=True):
        assert a.device == b.device == c.device == torch.device("cpu")
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_fake_tensors_do_not_outlive_their_mode():
    for first in (True, False):
        tree = Hierarchy((3, 0, 2, int(first)))
        real = None if first else tables(tree)
        with FakeTensorMode():
            fake = tables(tree)
        real = tables(tree) if real is None else real
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            assert type(a) is not torch.Tensor
            assert type(b) is torch.Tensor


def test_the_deepest_level_is_isolated_by_default():
    tree = Hierarchy((2, 1, 1))
    assert torch.equal(
        tree.attention_mask(5, 7, "isolated"),
        tree.attention_mask(5, 7, "isolated", isolate_level=2),
    )


def test_patch_and_token_coords_share_a_canvas():
    h, w = 8, 12
    tree = Hierarchy((2, 1, 3))
    own = tree.overlap(h, w).double()
    centres = own.T @ patch_coords(h, w).double() / own.sum(0)[:, None]
    torch.testing.assert_close(tree.token_coords(h, w)[:, 1:].double(), centres[:, 1:])
    assert torch.equal(tree.token_coords(h, w), tree.token_coords(512, 768))
    expected = [[0, y, x] for y in (8, 24) for x in (8, 24, 40, 56)]
    assert torch.equal(patch_coords(2, 4), torch.tensor(expected, dtype=torch.float32))


def test_trees_compare_hash_and_round_trip():
    tree = Hierarchy([4, 0, 1])
    assert tree == Hierarchy((4, 0, 1))
    assert len({tree, Hierarchy((4, 0, 1)), Hierarchy((4, 0, 2))}) == 2
    assert tree.to_json() == '{"tokens_per_node":[4,0,1]}'
    assert Hierarchy.from_json(tree.to_json()) == tree


@pytest.mark.parametrize(
    "counts",
    [(), (1,) * 7, (0, 0), (1, -1), (1.0,), (True,), ("3",), "3", 3, None, {1: 2}],
    ids=str,
)
def test_refuses_tokens_per_node(counts):
    with pytest.raises(ValueError, match="tokens_per_node"):
        Hierarchy(counts)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 10**5, '{"tokens_per_node":[0]}', '{"tokens_per_node":[1],"more":1}'],
    ids=["empty", "list", "object", "nested", "no-position", "more"],
)
def test_refuses_json(text):
    with pytest.raises(ValueError, match=r"text|tokens_per_node"):
        Hierarchy.from_json(text)
    assert json.loads(Hierarchy((1,)).to_json()) == {"tokens_per_node": [1]}


@pytest.mark.parametrize(
    "path", ["", "0", "//", "/4", "/0/", "/0/1/2", "/00", "/-1", "/a", 0, None]
)
def test_refuses_a_path(path):
    tree = Hierarchy((1, 1, 1))
    for ask in (tree.node, tree.span, tree.box, tree.subtree):
        with pytest.raises(ValueError, match=r"path must be .* got"):
            ask(path)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"h": 0}, "h must"),
        ({"w": 2.0}, "w must"),
        ({"w": True}, "w must"),
        ({"rule": "dense"}, "rule must be one of overlap, local, isolated"),
        ({"extra_text": -1}, "extra_text must"),
        ({"isolate_level": 2}, "isolate_level must be below the 2 levels"),
        ({"isolate_level": -1}, "isolate_level must"),
        ({"source": 4}, "source must be a pair"),
        ({"source": (2, 0)}, r"source\[1\] must"),
    ],
)
def test_refuses_mask_arguments(wrong, match):
    with pytest.raises(ValueError, match=match):
        Hierarchy((1, 1)).attention_mask(**{"h": 2, "w": 2, "rule": "isolated", **wrong})


@pytest.mark.parametrize("size", [(0, 1), (1, -2), (float("nan"), 1), (1, float("inf"))])
def test_refuses_coordinates_of_no_size(size):
    with pytest.raises(ValueError, match=r"(height|width) must be a positive finite number"):
        Hierarchy().token_coords(*size)
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        patch_coords(*size)
