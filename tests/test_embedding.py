import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy

from .random_embeddings import TREE, make, same


def test_a_node_is_a_view_of_its_positions():
    emb = make()
    assert emb["/1"].shape == (2, 2, 8)
    assert torch.equal(emb["/1"], emb.tokens[:, 5:7])
    assert emb["/1"].data_ptr() == emb.tokens[:, 5:7].data_ptr()
    assert emb["/3/3"].shape == (2, 1, 8)
    with pytest.raises(ValueError, match="path must be"):
        emb["/4"]


def test_batches_come_apart_and_together():
    emb = make(batch=3)
    assert len(emb) == 3
    assert torch.equal(emb.select(-1).tokens, emb.tokens[2:])
    assert torch.equal(emb.select(slice(0, 2)).pooled, emb.pooled[:2])
    assert same(SemanticEmbedding.cat([emb.select(0), emb.select(slice(1, 3))]), emb)
    assert same(SemanticEmbedding.cat(emb.select(i) for i in range(3)), emb)
    with pytest.raises(ValueError, match="at least one embedding"):
        SemanticEmbedding.cat(iter(()))
    with pytest.raises(IndexError, match="batch of 3, got 3"):
        emb.select(3)
    with pytest.raises(ValueError, match="tokens must be"):
        emb.select(slice(3, 3))


@pytest.mark.parametrize(
    "other",
    [make(tree=Hierarchy((3, 2))), make(dtype=torch.float64), make(pooled=None), make(pooled=4)],
    ids=["tree", "dtype", "no-pooled", "pooled-width"],
)
def test_unlike_embeddings_do_not_join(other):
    with pytest.raises(ValueError, match=r"embeddings\[1\] must"):
        SemanticEmbedding.cat([make(), other])
    with pytest.raises(ValueError, match="other must"):
        make().lerp(other, 0.5)


@pytest.mark.parametrize("mix", ["lerp", "slerp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_of_a_mix_are_bit_for_bit(mix, dtype):
    a, b = make(0, dtype=dtype), make(1, dtype=dtype)
    assert same(getattr(a, mix)(b, 0.0), a)
    assert same(getattr(a, mix)(b, 1.0), b)
    half = getattr(a, mix)(b, 0.5)
    assert half.tokens.dtype == dtype
    assert not same(half, a)
    assert not same(half, b)


def test_lerp_is_the_formula():
    a, b = make(0), make(1)
    mixed = a.lerp(b, 0.3)
    torch.testing.assert_close(mixed.tokens, 0.7 * a.tokens + 0.3 * b.tokens)
    torch.testing.assert_close(mixed.pooled, 0.7 * a.pooled + 0.3 * b.pooled)


def test_slerp_turns_evenly_and_scales_linearly():
    a, b = make(0, dtype=torch.float64), make(1, dtype=torch.float64)
    mixed = a.slerp(b, 0.25).tokens
    length = lambda t: t.norm(dim=-1)
    torch.testing.assert_close(length(mixed), 0.75 * length(a.tokens) + 0.25 * length(b.tokens))

    def angle(u, v):
        return torch.acos((u * v).sum(-1) / length(u) / length(v))

    whole = angle(a.tokens, b.tokens)
    torch.testing.assert_close(angle(a.tokens, mixed), 0.25 * whole)
    torch.testing.assert_close(angle(mixed, b.tokens), 0.75 * whole)


def test_slerp_of_parallel_opposite_and_zero_vectors_is_lerp():
    tree = Hierarchy((3,))
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    a = SemanticEmbedding(torch.stack([x, x, torch.zeros(8)])[None], tree)
    b = SemanticEmbedding(torch.stack([2 * x, -x, x])[None], tree)
    torch.testing.assert_close(a.slerp(b, 0.25).tokens, a.lerp(b, 0.25).tokens)


def test_weights_for_levels_and_nodes():
    a, b = make(0), make(1)
    level = TREE.token_level[:, None]
    by_level = a.lerp(b, (0.0, 0.5, 1.0)).tokens
    expected = torch.where(level == 0, a.tokens, torch.where(level == 2, b.tokens, 0))
    assert torch.equal(by_level[:, (level != 1)[:, 0]], expected[:, (level != 1)[:, 0]])
    torch.testing.assert_close(by_level[:, 3:11], (0.5 * (a.tokens + b.tokens))[:, 3:11])

    deep = a.lerp(b, {"/1": 1.0, "/1/2": 0.0, "/3/0": 0.5})
    taken = TREE.subtree("/1") & ~TREE.subtree("/1/2")
    half = TREE.subtree("/3/0")
    assert torch.equal(deep.tokens[:, taken], b.tokens[:, taken])
    assert torch.equal(deep.tokens[:, ~taken & ~half], a.tokens[:, ~taken & ~half])
    torch.testing.assert_close(deep["/3/0"], 0.5 * (a["/3/0"] + b["/3/0"]))
    assert torch.equal(deep.pooled, a.pooled)

    some = a.lerp(b, 1.0, nodes=["/2", "/0/1"])
    inside = TREE.subtree("/2") | TREE.subtree("/0/1")
    assert torch.equal(some.tokens, torch.where(inside[:, None], b.tokens, a.tokens))
    assert same(a.lerp(b, 1.0, nodes=(path for path in ("/2", "/0/1"))), some)
    with torch.device("meta"):
        assert same(a.lerp(b, 1.0, nodes=["/2", "/0/1"]), some)


def test_a_transplant_takes_the_node_and_what_is_below():
    a, b = make(0), make(1, pooled=None)
    moved = a.transplant(b, "/1")
    inside = torch.zeros(TREE.num_tokens, dtype=torch.bool)
    for path in ("/1", "/1/0", "/1/1", "/1/2", "/1/3"):
        inside[TREE.span(path)] = True
    assert torch.equal(moved.tokens, torch.where(inside[:, None], b.tokens, a.tokens))
    assert torch.equal(moved.pooled, a.pooled)
    assert same(a.transplant(make(1), "/"), make(1))
    one = a.transplant(make(2, batch=1), "/0").tokens
    assert torch.equal(one[:, 3:5], make(2, batch=1)["/0"].expand(2, -1, -1))


@pytest.mark.parametrize(
    ("weight", "nodes", "match"),
    [
        (float("nan"), None, "finite"),
        (True, None, "finite"),
        ("half", None, "finite"),
        ((0.5, 0.5), None, "each of 3 levels"),
        ({"/5": 0.5}, None, "path must be"),
        ({"/1": float("inf")}, None, "finite"),
        (0.5, ["/9"], "path must be"),
        (0.5, "/1", "sequence of paths"),
    ],
)
def test_refuses_weights(weight, nodes, match):
    with pytest.raises(ValueError, match=match):
        make(0).lerp(make(1), weight, nodes)


def test_refuses_another_batch():
    with pytest.raises(ValueError, match="other must have a batch of 1 or 2, got 3"):
        make().slerp(make(batch=3), 0.5)


def test_gradients_pass_through_a_mix():
    tokens = torch.randn(1, TREE.num_tokens, 8, requires_grad=True)
    other = make(batch=1, pooled=None)
    SemanticEmbedding(tokens, TREE).lerp(other, 0.25).tokens.sum().backward()
    torch.testing.assert_close(tokens.grad, torch.full_like(tokens, 0.75))


def test_truncate_keeps_the_coarse_levels():
    emb = make()
    coarse = emb.truncate(levels=2)
    assert coarse.tree == Hierarchy((3, 2))
    assert torch.equal(coarse.tokens, emb.tokens[:, :11])
    assert same(emb.truncate(3), emb)
    for levels in (0, 4, True, 1.5, 2.0):
        with pytest.raises(ValueError, match="levels must be 1 to 3"):
            emb.truncate(levels)


def test_to_moves_tokens_and_pooled():
    half = make().to(torch.bfloat16)
    assert (half.tokens.dtype, half.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match="floating"):
        make().to(torch.int32)


@pytest.mark.parametrize(
    ("tokens", "pooled", "match"),
    [
        (
            torch.zeros(2, 26, 8),
            None,
            r"\[B, 27, C\] for the hierarchy \(3, 2, 1\), got \[2, 26, 8\]",
        ),
        (torch.zeros(27, 8), None, "tokens must be"),
        (torch.zeros(0, 27, 8), None, "tokens must be"),
        (torch.zeros(2, 27, 8).long(), None, "floating"),
        (torch.full((2, 27, 8), float("nan")), None, "finite, got 432"),
        (torch.full((1, 27, 8), float("inf")), None, "finite"),
        (torch.zeros(2, 27, 8), torch.zeros(1, 4), r"pooled must be \[2, P\]"),
        (torch.zeros(2, 27, 8), torch.full((2, 4), float("nan")), "pooled must be finite"),
        ([[0.0]], None, "tokens must be a tensor"),
        (torch.zeros(2, 27, 8), torch.zeros(2, 4).numpy(), "pooled must be a tensor, got ndarray"),
    ],
)
def test_refuses_tensors(tokens, pooled, match):
    with pytest.raises(ValueError, match=match):
        SemanticEmbedding(tokens, TREE, pooled)


def test_a_file_carries_everything_and_is_byte_stable(tmp_path):
    for number, emb in enumerate((make(), make(dtype=torch.bfloat16), make(pooled=None))):
        first, second = tmp_path / f"{number}.safetensors", tmp_path / f"{number}b.safetensors"
        emb.save(first)
        loaded = SemanticEmbedding.load(first, tree=TREE)
        assert same(loaded, emb)
        assert loaded.tokens.dtype == emb.tokens.dtype
        # a strided view of equal content must write the same bytes
        strided = emb.tokens.mT.contiguous().mT
        SemanticEmbedding(strided, emb.tree, emb.pooled).save(second)
        assert first.read_bytes() == second.read_bytes()
        with safe_open(first, "pt") as file:
            assert list(file.metadata()) == ["sda_fast"]
            about = json.loads(file.metadata()["sda_fast"])
        assert about == {"format": "sda_fast.embedding", "hierarchy": [3, 2, 1], "version": 1}
    make().truncate(1).select(0).save(tmp_path / "view.safetensors")
    assert SemanticEmbedding.load(tmp_path / "view.safetensors").tokens.shape == (1, 3, 8)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    make(0).save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(1).save(path)
    assert same(SemanticEmbedding.load(path), make(0))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["tokens", "pooled"])
def test_what_became_nan_is_not_saved(tmp_path, name):
    emb = make()
    getattr(emb, name)[0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        emb.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def write_foreign(path, kind):
    """A file that is no whole embedding, and what the error must say of it."""
    about = {"format": "sda_fast.embedding", "hierarchy": [3, 2, 1], "version": 1}
    tensors = {"tokens": torch.zeros(1, 27, 8)}
    if kind == "empty":
        path.write_bytes(b"")
        return "truncated"
    if kind == "truncated":
        make().save(path)
        path.write_bytes(path.read_bytes()[:-1])
        return "truncated"
    if kind in ("nested", "digits"):
        save_file(tensors, path, {"sda_fast": {"nested": "[" * 10**5, "digits": "1" * 10**4}[kind]})
        return "no embedding"
    if kind == "no-metadata":
        save_file(tensors, path)
        return "no embedding"
    changed, match = {
        "format": ({"format": "other"}, "must be of format"),
        "version": ({"version": 2}, "must be of format"),
        "hierarchy": ({"hierarchy": [0]}, "tokens_per_node"),
        "shape": ({"hierarchy": [3, 2]}, r"tokens must be \[B, 11, C\]"),
        "tensors": ({}, "must hold tokens and perhaps pooled"),
        "nan": ({}, "finite"),
    }[kind]
    if kind == "tensors":
        tensors["more"] = torch.zeros(1)
    if kind == "nan":
        tensors["tokens"][0, 0, 0] = float("nan")
    save_file(tensors, path, {"sda_fast": json.dumps(about | changed)})
    return match


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "truncated",
        "no-metadata",
        "nested",
        "digits",
        "format",
        "version",
        "hierarchy",
        "shape",
        "tensors",
        "nan",
    ],
)
def test_refuses_a_foreign_file_by_name(tmp_path, kind):
    path = tmp_path / "foreign.safetensors"
    match = write_foreign(path, kind)
    with pytest.raises(ValueError, match=rf"foreign\.safetensors.*{match}"):
        SemanticEmbedding.load(path)


def test_refuses_other_hierarchies_suffixes_and_places(tmp_path):
    path = tmp_path / "a.safetensors"
    make().save(path)
    with pytest.raises(ValueError, match=r"a\.safetensors must be of the hierarchy \(32, 8, 4\)"):
        SemanticEmbedding.load(path, tree=Hierarchy())
    with pytest.raises(ValueError, match="tree must be a Hierarchy, got tuple"):
        SemanticEmbedding.load(path, tree=(3, 2))
    for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        pickled = tmp_path / f"a{suffix}"
        pickled.write_bytes(path.read_bytes())
        with pytest.raises(ValueError, match=rf"\.safetensors.*a\{suffix}"):
            SemanticEmbedding.load(pickled)
        with pytest.raises(ValueError, match=rf"\.safetensors.*a\{suffix}"):
            make().save(pickled)
    with pytest.raises(FileNotFoundError, match="nothere"):
        SemanticEmbedding.load(tmp_path / "nothere.safetensors")
    with pytest.raises(FileNotFoundError, match="nothere"):
        make().save(tmp_path / "nothere" / "a.safetensors")


def test_what_became_nan_is_not_handed_to_flux():
    emb = make()
    emb.tokens[0, 3, 1] = float("nan")
    with pytest.raises(ValueError, match="tokens must be finite, got 1 values"):
        emb.flux_inputs(64, 64)
