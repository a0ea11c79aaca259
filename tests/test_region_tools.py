"""Parts of pictures put together in the embedding: what goes over, by how much, and what stays."""

import pytest
import torch

from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from sda_fast.mixing import coverage, mean, shares
from sda_fast.pipeline import SemanticPipeline
from sda_fast.scenes.render import render
from sda_fast.scenes.world import SMALL, sample_scenes

from .random_embeddings import TREE, make, same


def by_path(tree, nodes):
    found = coverage(tree, nodes).tolist()
    return {node.path: share for node, share in zip(tree.nodes(), found, strict=True) if share}


def test_coverage_is_the_share_of_the_area():
    below = {f"/1/{i}": 1.0 for i in range(4)}
    assert by_path(TREE, ["/1"]) == {"/": 1 / 4, "/1": 1.0, **below}
    assert by_path(TREE, ["/1/2"]) == {"/": 1 / 16, "/1": 1 / 4, "/1/2": 1.0}
    assert set(coverage(TREE, ["/"]).tolist()) == {1.0}
    # a place that two nodes cover counts once, and a node whose children are all there is there
    assert by_path(TREE, ["/1", "/1/2", "/1"]) == by_path(TREE, ["/1"])
    assert by_path(TREE, [f"/1/{i}" for i in range(4)]) == by_path(TREE, ["/1"])
    assert by_path(TREE, ["/0/3", "/3"])["/"] == 5 / 16
    deep = Hierarchy((1,) * 6)
    assert by_path(deep, ["/0/1/2/3/0"])["/0"] == 4**-4
    assert coverage(Hierarchy((2,)), ["/"]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        ([], "at least one node"),
        (["/4"], "path must be"),
        ("/1", "sequence of paths, got the text"),
    ],
)
def test_coverage_refuses(nodes, match):
    with pytest.raises(ValueError, match=match):
        coverage(TREE, nodes)


def test_a_blended_transplant_takes_ancestors_along_by_area():
    a, b = make(0), make(1)
    moved = a.transplant(b, "/1/2", blend=True)
    assert torch.equal(moved["/1/2"], b["/1/2"])
    torch.testing.assert_close(moved["/1"], 0.75 * a["/1"] + 0.25 * b["/1"])
    torch.testing.assert_close(moved["/"], 15 / 16 * a["/"] + 1 / 16 * b["/"])
    torch.testing.assert_close(moved.pooled, 15 / 16 * a.pooled + 1 / 16 * b.pooled)
    changed = (moved.tokens != a.tokens).any(-1)[0]
    touched = torch.zeros(TREE.num_tokens, dtype=torch.bool)
    for path in ("/", "/1", "/1/2"):
        touched[TREE.span(path)] = True
    assert torch.equal(changed, touched)
    assert same(a.transplant(b, "/", blend=True), b)
    with pytest.raises(ValueError, match=r"other must have pooled .* where the root is mixed"):
        a.transplant(make(1, pooled=None), "/1", blend=True)
    with pytest.raises(ValueError, match="path must be"):
        a.transplant(b, "/7", blend=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mix_is_the_weighted_mean(dtype):
    embeddings = [make(seed, dtype=dtype) for seed in range(3)]
    mixed = SemanticEmbedding.mix(embeddings, [1, 3, 4])
    wanted = [
        (a.double() + 3 * b.double() + 4 * c.double()) / 8
        for a, b, c in ([e.tokens for e in embeddings], [e.pooled for e in embeddings])
    ]
    torch.testing.assert_close(mixed.tokens, wanted[0].to(dtype))
    torch.testing.assert_close(mixed.pooled, wanted[1].to(dtype))
    assert mixed.tokens.dtype == dtype
    again = SemanticEmbedding.mix(iter(embeddings), (0.25, 0.75, 1.0))  # only ratios count
    assert same(again, mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_the_weight_gives_an_embedding_bit_for_bit(dtype):
    embeddings = [make(seed, dtype=dtype) for seed in range(3)]
    for row, weights in enumerate(([7.0, 0, 0], [0, 0.1, 0], [0, 0, 1e-300])):
        assert same(SemanticEmbedding.mix(embeddings, weights), embeddings[row])
    assert same(SemanticEmbedding.mix(embeddings[:1], [0.3]), embeddings[0])
    embeddings[0].tokens.zero_().neg_()
    mixed = SemanticEmbedding.mix(embeddings, [1, 0, 0]).tokens
    assert mixed.signbit().all()  # -0.0 is not 0.0


def test_a_mix_of_nodes_leaves_the_rest_to_the_first():
    a, b, c = (make(seed) for seed in range(3))
    mixed = SemanticEmbedding.mix([a, b, c], [0, 1, 1], nodes=["/1", "/2/3"])
    middle = 0.5 * (b.tokens + c.tokens)
    share = {"/": 5 / 16, "/2": 1 / 4, "/1": 1.0, "/2/3": 1.0}
    share |= {f"/1/{i}": 1.0 for i in range(4)}
    for node in TREE.nodes():
        span, part = TREE.span(node.path), share.get(node.path, 0.0)
        wanted = (1 - part) * a.tokens[:, span] + part * middle[:, span]
        torch.testing.assert_close(mixed.tokens[:, span], wanted)
        assert part or torch.equal(mixed.tokens[:, span], a.tokens[:, span])
    torch.testing.assert_close(mixed.pooled, 11 / 16 * a.pooled + 5 / 32 * (b.pooled + c.pooled))
    one = SemanticEmbedding.mix([a, b], [0, 1], nodes=["/1"])
    assert same(one, a.transplant(b, "/1", blend=True))


def test_a_mix_of_batches_and_without_pooled():
    many, one = make(0, batch=3, pooled=None), make(1, batch=1, pooled=None)
    mixed = SemanticEmbedding.mix([many, one], [1, 1], ["/3"])
    torch.testing.assert_close(mixed["/3"], 0.5 * (many["/3"] + one["/3"]))
    assert mixed.pooled is None
    assert SemanticEmbedding.mix([many, one], [0, 1]).tokens.shape == many.tokens.shape
    with pytest.raises(ValueError, match=r"embeddings\[1\] must have a batch of 1, got 3"):
        SemanticEmbedding.mix([one, many], [1, 1])


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1], "weights must be a number for each of 2, got"),
        ("11", "weights must be a number for each of 2, got '11'"),
        (0.5, "weights must be a number for each of 2, got 0.5"),
        ([1, -1], "weights must be finite, none below 0"),
        ([1, float("nan")], "weights must be finite"),
        ([1, float("inf")], "weights must be finite"),
        ([0, 0.0], "one above it"),
        ([True, 1], "weights must be finite"),
        ([1, "1"], "weights must be finite"),
    ],
)
def test_a_mix_refuses_weights(weights, match):
    with pytest.raises(ValueError, match=match):
        SemanticEmbedding.mix([make(0), make(1)], weights)


@pytest.mark.parametrize(
    ("others", "match"),
    [
        ([], "embeddings must hold at least one embedding, got none"),
        (["/1"], r"embeddings\[0\] must be a SemanticEmbedding, got str"),
        ([make(), None], r"embeddings\[1\] must be a SemanticEmbedding, got NoneType"),
        ([make(), make(tree=Hierarchy((3, 2)))], r"embeddings\[1\] must agree in hierarchy"),
        ([make(), make(1), make(dtype=torch.float64)], r"embeddings\[2\] must agree"),
        ([make(), make(pooled=4)], r"embeddings\[1\] must have pooled"),
        ([make(), make(batch=3)], r"embeddings\[1\] must have a batch of 1 or 2, got 3"),
    ],
)
def test_a_mix_refuses_embeddings(others, match):
    with pytest.raises(ValueError, match=match):
        SemanticEmbedding.mix(others, [1] * len(others))


def test_a_mix_refuses_nodes():
    with pytest.raises(ValueError, match="path must be"):
        SemanticEmbedding.mix([make(0), make(1)], [1, 1], ["/1", "/5"])
    with pytest.raises(ValueError, match="nodes must name at least one node"):
        SemanticEmbedding.mix([make(0), make(1)], [1, 1], [])


def test_shares_have_the_sum_1_and_do_not_overflow():
    assert shares([1, 2, 1], 3) == [0.25, 0.5, 0.25]
    assert shares([1e308, 1e308], 2) == [0.5, 0.5]
    assert shares([5e-324, 0], 2) == [1.0, 0.0]


def test_a_mean_is_taken_in_a_wide_dtype():
    tensors = [torch.full((1, 2), value, dtype=torch.float16) for value in (6e4, 6e4, 100.0)]
    found = mean(tensors, [0.5, 0.25, 0.25])
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), torch.full((1, 2), 45025.0), rtol=1e-3, atol=0)


def test_the_way_from_one_picture_to_another():
    a, b = make(0, batch=1), make(1, batch=1)
    for mode in ("lerp", "slerp"):
        way = a.interpolate(b, 5, mode, nodes=(path for path in ("/1",)))
        assert len(way) == 5
        for i in range(5):
            assert same(way.select(i), getattr(a, mode)(b, i / 4, ["/1"]))
    assert same(a.interpolate(b).select(2), a.slerp(b, 0.5))
    with pytest.raises(ValueError, match="steps must be an integer >= 2, got 1"):
        a.interpolate(b, 1)
    with pytest.raises(ValueError, match="mode must be one of slerp, lerp, got 'cut'"):
        a.interpolate(b, mode="cut")
    with pytest.raises(ValueError, match="self must be one picture, got 2"):
        make().interpolate(b)
    with pytest.raises(ValueError, match="other must have a batch of 1, got 2"):
        a.interpolate(make())


def test_a_blended_transplant_comes_out_nearer_to_the_other_picture():
    """In the shipped model, whose root holds much of an object's colour."""
    pipe = SemanticPipeline.from_pretrained("scenes")
    pipe.flux.set_progress_bar_config(disable=True)
    emb = pipe.encode(render(sample_scenes(SMALL, "test", 12, 32), SMALL.size))
    a, b = emb.select(slice(0, 16)), emb.select(slice(16, 32))
    plain, blended, other = (
        pipe.decode(e, seed=range(16), steps=8, output="pt")[..., :16, 16:]
        for e in (a.transplant(b, "/1"), a.transplant(b, "/1", blend=True), b)
    )
    assert (blended - other).abs().mean() < (plain - other).abs().mean()
