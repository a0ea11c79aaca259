"""The script editor: what each operation does, in their order, and what is refused whole."""

import json
import textwrap

import pytest
import torch

from sda_fast.editors.result import Editor, EditResult
from sda_fast.editors.script import ScriptEditor
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy

TREE = Hierarchy((3, 2, 1))
WIDTH = 4


def make(seed=0, batch=1, tree=TREE, width=WIDTH, dtype=torch.float32, pooled=5):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, tree.num_tokens, width, generator=generator).to(dtype)
    vector = torch.randn(batch, pooled, generator=generator).to(dtype) if pooled else None
    return SemanticEmbedding(tokens, tree, vector)


def carry_out(emb, *operations, **others):
    return ScriptEditor(others).edit(emb, json.dumps(operations))


def same(a, b):
    """Every bit, the sign of zero included."""
    bits = (e.tokens.contiguous().view(torch.uint8) for e in (a, b))
    return torch.equal(*bits) and torch.equal(a.pooled, b.pooled)


def inside(*paths):
    return torch.stack([TREE.subtree(path) for path in paths]).any(0)


def check_only(result, *paths):
    """What changed are exactly these nodes with their descendants."""
    assert torch.equal(result.edited, inside(*paths).expand(len(result.embedding), -1))
    kept = ~inside(*paths)
    assert torch.equal(result.embedding.tokens[:, kept], result.source.tokens[:, kept])


def test_it_is_an_editor():
    assert isinstance(ScriptEditor(), Editor)


def test_copy_takes_the_node_and_what_is_below():
    emb = make(batch=2)
    result = carry_out(emb, {"op": "copy", "from": "/0", "to": "/3"})
    check_only(result, "/3")
    for below in ("", "/0", "/1", "/2", "/3"):
        assert torch.equal(result.embedding[f"/3{below}"], emb[f"/0{below}"])
    assert result.touched == (("/3", "/3/0", "/3/1", "/3/2", "/3/3"),) * 2
    assert result.boxes == (tuple(TREE.box(f"/3/{i}") for i in range(4)),) * 2


def test_swap_exchanges_two_nodes_and_twice_nothing():
    emb = make(batch=2)
    swap = {"op": "swap", "nodes": ["/1/2", "/2/1"]}
    result = carry_out(emb, swap)
    check_only(result, "/1/2", "/2/1")
    assert torch.equal(result.embedding["/1/2"], emb["/2/1"])
    assert torch.equal(result.embedding["/2/1"], emb["/1/2"])
    back = carry_out(emb, swap, swap)
    assert same(back.embedding, emb)
    assert not back.edited.any()


def test_zero_empties_a_node():
    result = carry_out(make(), {"op": "zero", "node": "/2"})
    check_only(result, "/2")
    assert not result.embedding.tokens[:, inside("/2")].any()
    again = carry_out(result.embedding, {"op": "zero", "node": "/2"})
    assert not again.edited.any()


def test_edited_sees_the_sign_of_zero():
    tokens = make().tokens.clone()
    tokens[:, 0] = -0.0
    result = carry_out(SemanticEmbedding(tokens, TREE), {"op": "zero", "node": "/"})
    assert result.edited.all()
    assert result.change[0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_set_writes_the_positions_of_the_node_alone(dtype):
    vectors = [[0.5, -1, 2, 0], [1, 2, 3, 4]]
    result = carry_out(make(batch=2, dtype=dtype), {"op": "set", "node": "/1", "vectors": vectors})
    assert torch.equal(result.embedding["/1"], torch.tensor([vectors, vectors], dtype=dtype))
    assert result.edited[0].nonzero().flatten().tolist() == [5, 6]


def test_lerp_and_transplant_are_those_of_the_embedding():
    emb, b = make(0, batch=2), make(1, batch=2)
    lerp = {"op": "lerp", "other": "b", "weight": 0.25, "node": "/1"}
    result = carry_out(emb, lerp, b=b)
    check_only(result, "/1")
    assert same(result.embedding, emb.lerp(b, 0.25, ["/1"]))
    whole = carry_out(emb, lerp | {"node": "/", "weight": 1}, b=b)
    assert same(whole.embedding, b)

    transplant = {"op": "transplant", "other": "b", "node": "/3/0"}
    result = carry_out(emb, transplant, b=b)
    check_only(result, "/3/0")
    assert same(result.embedding, emb.transplant(b, "/3/0"))
    blended = carry_out(emb, transplant | {"blend": True}, b=b)
    assert same(blended.embedding, emb.transplant(b, "/3/0", blend=True))
    assert blended.edited[:, TREE.span("/")].all()


def test_operations_are_applied_in_their_order():
    emb, b = make(0), make(1)
    operations = [
        {"op": "transplant", "other": "b", "node": "/0"},
        {"op": "copy", "from": "/0", "to": "/3"},
        {"op": "zero", "node": "/0"},
    ]
    result = carry_out(emb, *operations, b=b)
    check_only(result, "/0", "/3")
    assert torch.equal(result.embedding["/3/2"], b["/0/2"])
    assert not result.embedding["/0"].any()
    assert not carry_out(emb, *operations[::-1], b=b).embedding["/3"].any()


def test_the_example_of_the_docstring_runs():
    text = ScriptEditor.__doc__
    script = textwrap.dedent(text[text.index("[\n") : text.index("]\n\n") + 1])
    used = [operation["op"] for operation in json.loads(script)]
    assert sorted(used) == ["copy", "lerp", "set", "swap", "transplant", "zero"]
    emb = make(width=2)
    result = ScriptEditor({"b": make(1, width=2)}).edit(emb, script)
    assert result.edited[:, TREE.span("/")].all()
    assert torch.equal(result.embedding["/3/1"], make(1, width=2)["/3/1"])


def test_one_script_for_each_picture_and_others_picture_by_picture():
    emb, b, c = make(0, batch=2), make(1, batch=2), make(2)
    scripts = [
        json.dumps([{"op": "transplant", "other": "b", "node": "/0"}]),
        json.dumps([{"op": "transplant", "other": name, "node": "/1"} for name in "bc"]),
    ]
    result = ScriptEditor({"b": b, "c": c}).edit(emb, scripts)
    assert same(result.embedding.select(0), emb.select(0).transplant(b.select(0), "/0"))
    assert same(result.embedding.select(1), emb.select(1).transplant(c, "/1"))
    assert result.instructions == tuple(scripts)
    both = ScriptEditor({"b": b}).edit(emb, scripts[0])
    assert same(both.embedding, emb.transplant(b, "/0"))
    with pytest.raises(ValueError, match=r"instruction must be one, or one for each of 2, got 3"):
        ScriptEditor().edit(emb, scripts + scripts[:1])
    with pytest.raises(ValueError, match=r"instruction\[1\], operation 0 \(zero\): node: path"):
        ScriptEditor({"b": b}).edit(emb, [scripts[0], '[{"op": "zero", "node": "/4"}]'])


def test_edits_chain_and_are_undone():
    emb = make()
    first = carry_out(emb, {"op": "zero", "node": "/0"})
    second = carry_out(first, {"op": "copy", "from": "/1", "to": "/2"})
    assert second.parent is first
    assert second.source is first.embedding
    check_only(second, "/2")
    assert second.undo() is first
    assert second.undo(2) is emb


def test_the_source_stays_as_it_was():
    emb = make()
    before = SemanticEmbedding(emb.tokens.clone(), TREE, emb.pooled.clone())
    vectors = [[0.0] * WIDTH] * 3
    operations = (
        {"op": "set", "node": "/", "vectors": vectors},
        {"op": "zero", "node": "/1"},
        {"op": "swap", "nodes": ["/2", "/3"]},
    )
    carry_out(emb, *operations)
    assert same(emb, before)
    with pytest.raises(ValueError, match="operation 3"):
        carry_out(emb, *operations, {"op": "zero", "node": "/9"})
    assert same(emb, before)


ZERO = {"op": "zero", "node": "/0"}
SET = {"op": "set", "node": "/1/1", "vectors": [[1, 2, 3, 4]]}
LERP = {"op": "lerp", "other": "b", "weight": 0.5, "node": "/1"}
COPY = {"op": "copy", "from": "/0", "to": "/1"}
TRANSPLANT = {"op": "transplant", "other": "b", "node": "/1"}
REFUSED = {
    "unknown op": ({"op": "rotate"}, r"operation 1 must be an object whose op is one of copy,"),
    "no op": ({"node": "/"}, "whose op is one of"),
    "op of another type": ({"op": ["zero"]}, "whose op is one of"),
    "no object": ("zero", "operation 1 must be an object"),
    "unknown node": (ZERO | {"node": "/4"}, r"\(zero\): node: path must be .* got '/4'"),
    "node too deep": (COPY | {"to": "/0/0/0"}, r"\(copy\): to: path must be"),
    "node of another type": (ZERO | {"node": 1}, "node: path must be"),
    "unknown key": (ZERO | {"nodes": []}, r"keys must be among \['node', 'op'\], got \['nodes'\]"),
    "missing key": ({"op": "copy", "from": "/0"}, r"the key 'to' must be there, got"),
    "levels": (COPY | {"to": "/1/0"}, "from and to must be of one level, got '/0' and '/1/0'"),
    "swap of levels": ({"op": "swap", "nodes": ["/", "/0"]}, "nodes must be of one level"),
    "swap of three": ({"op": "swap", "nodes": ["/0", "/1", "/2"]}, "a list of two paths, got"),
    "swap of a text": ({"op": "swap", "nodes": "/0"}, "a list of two paths, got '/0'"),
    "weight": (LERP | {"weight": "half"}, "weight must be a finite number, got 'half'"),
    "weight true": (LERP | {"weight": True}, "weight must be a finite number, got True"),
    "weight without end": (LERP | {"weight": 10**400}, "weight must be a finite number"),
    "unknown other": (LERP | {"other": "d"}, r"other must be one of \['b',.*got 'd'"),
    "other of another type": (LERP | {"other": ["b"]}, r"other must be one of"),
    "other hierarchy": (LERP | {"other": "tree"}, r"other 'tree' must agree in hierarchy"),
    "other width": (TRANSPLANT | {"other": "width"}, "other 'width' must agree"),
    "other dtype": (TRANSPLANT | {"other": "dtype"}, "other 'dtype' must agree"),
    "other batch": (TRANSPLANT | {"other": "batch"}, "other 'batch' must have a batch of 1 or 2"),
    "other pooled": (LERP | {"other": "bare", "node": "/"}, "'bare' must have pooled .* root"),
    "blended pooled": (TRANSPLANT | {"other": "bare", "blend": True}, "must have pooled"),
    "blend": (TRANSPLANT | {"blend": 1}, "blend must be true or false, got 1"),
    "one vector": (SET | {"vectors": [1, 2, 3, 4]}, "vectors must be 1 lists of 4 numbers"),
    "two vectors": (SET | {"vectors": [[1, 2, 3, 4]] * 2}, "one for each position of /1/1, got"),
    "narrow vectors": (SET | {"vectors": [[1, 2, 3]]}, "1 lists of 4 numbers"),
    "words": (SET | {"vectors": [[1, 2, 3, "4"]]}, "made of finite numbers, got '4'"),
    "truth": (SET | {"vectors": [[1, 2, 3, True]]}, "made of finite numbers, got True"),
    "too large": (SET | {"vectors": [[1, 2, 3, 1e300]]}, "vectors must be finite"),
    "mixed too far": (LERP | {"weight": 1e38}, r"\(lerp\): tokens must be finite"),
}


def others():
    return {
        "b": make(1),
        "tree": make(tree=Hierarchy((3, 2))),
        "width": make(width=5),
        "dtype": make(dtype=torch.float64),
        "batch": make(batch=3),
        "bare": make(pooled=None),
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_an_operation_by_its_number(kind, monkeypatch):
    operation, match = REFUSED[kind]
    if kind != "mixed too far":  # which shows in the numbers alone
        monkeypatch.delattr(ScriptEditor, "_carry_out")  # nothing is applied
    emb = SemanticEmbedding(make(batch=2).tokens * 10, TREE, make(batch=2).pooled)
    with pytest.raises(ValueError, match=match) as caught:
        carry_out(emb, ZERO, operation, **others())
    assert str(caught.value).startswith("instruction, operation 1")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("remove the red circle", "instruction must be JSON"),
        ("", "instruction must be a text that says something"),
        ('[{"op": "zero", "node": "/"}', "instruction must be JSON"),
        ("[" * 10**5, "instruction must be JSON"),
        ("{}", "instruction must be a list of operations"),
        ("[]", "instruction must be a list of operations"),
        ('[{"op": "zero", "node": "/0", "node": "/1"}]', "a key is there twice"),
        ('[{"op": "lerp", "other": "b", "weight": NaN, "node": "/"}]', "NaN is no JSON number"),
        ('[{"op": "set", "node": "/1/1", "vectors": [[1, 2, 3, -Infinity]]}]', "-Infinity is no"),
        ('[{"op": "set", "node": "/1/1", "vectors": [[1, 2, 3, 1e999]]}]', "finite numbers"),
    ],
)
def test_refuses_a_text_that_is_no_script(text, match):
    with pytest.raises(ValueError, match=match):
        ScriptEditor({"b": make(1)}).edit(make(), text)


def test_set_refuses_a_node_without_positions():
    emb = make(tree=Hierarchy((0, 2)))
    with pytest.raises(ValueError, match="node must hold positions, got '/'"):
        carry_out(emb, {"op": "set", "node": "/", "vectors": []})


def test_refuses_sources_and_others():
    text = json.dumps([ZERO])
    with pytest.raises(ValueError, match="emb must be a SemanticEmbedding or an EditResult"):
        ScriptEditor().edit(make().tokens, text)
    emb = make()
    emb.tokens[0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="emb must be finite"):
        ScriptEditor().edit(emb, text)
    with pytest.raises(ValueError, match="others must be SemanticEmbeddings by name, got Tensor"):
        ScriptEditor({"b": make().tokens})
    with pytest.raises(ValueError, match="others must be SemanticEmbeddings by name"):
        ScriptEditor({1: make()})


def test_gradients_reach_the_source():
    tokens = make().tokens.requires_grad_()
    emb = SemanticEmbedding(tokens, TREE)
    result = carry_out(emb, {"op": "copy", "from": "/0", "to": "/3"}, {"op": "zero", "node": "/1"})
    assert isinstance(result, EditResult)
    result.embedding.tokens.sum().backward()
    expected = torch.ones(TREE.num_tokens) + inside("/0").float() - inside("/1", "/3").float()
    assert torch.equal(tokens.grad, expected[None, :, None].expand_as(tokens))
