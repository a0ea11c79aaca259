"""The T5 editor: what each mode sees, writes and keeps."""

import copy

import pytest
import torch

from sda_fast.editors.result import TOUCHED, EditResult, relative_change
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.t5_config import MODES, PRESETS
from sda_fast.editors.t5_inputs import above_table
from sda_fast.editors.text import MULTIPLE, InstructionEncoder
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy

from .tiny_editors import FEATURES, tiny_editor, tiny_text_encoder

TREE, CHANNELS = Hierarchy((3, 2, 1)), 12
N = TREE.num_tokens
CLOSE = {"rtol": 0, "atol": 2e-5}
SLICES = (slice(0, 3), slice(3, 11), slice(11, 27))


def given(batch=2, words=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(batch, N, CHANNELS, generator=generator)
    text = torch.randn(batch, words, FEATURES, generator=generator)
    said = torch.tensor([words - 3 * row for row in range(batch)])
    return source, text, torch.arange(words) < said[:, None]


def embedding(batch=2, seed=0, **options):
    source, *_ = given(batch, seed=seed)
    return SemanticEmbedding(source.to(**options), TREE, torch.ones(batch, 5))


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def editor(mode):
    return tiny_editor(mode)


def test_what_is_kept_changes_nothing(editor):
    found, again = (editor.generate(*given(), cache=cache) for cache in (True, False))
    torch.testing.assert_close(found.tokens, again.tokens, **CLOSE)
    assert (found.gate is not None) == (editor.mode == "delta")


def test_in_use_it_says_what_it_says_in_training_of_its_own_words(editor):
    found = editor.generate(*given())
    taught = editor(*given(), found.tokens)
    torch.testing.assert_close(found.tokens, taught.tokens, **CLOSE)


def test_a_sample_alone_is_as_in_a_batch(editor):
    source, text, mask = given()
    both = editor.generate(source, text, mask).tokens
    alone = editor.generate(source[1:], text[1:, :7], mask[1:, :7]).tokens
    torch.testing.assert_close(alone, both[1:], **CLOSE)


def test_unsaid_words_are_not_read(editor):
    source, text, mask = given()
    other = torch.where(mask[..., None], text, 100.0)
    before, after = editor.generate(source, text, mask), editor.generate(source, other, mask)
    assert torch.equal(before.tokens, after.tokens)


def test_words_and_source_are_read(editor):
    source, text, mask = given()
    before = editor.generate(source, text, mask).tokens
    assert (editor.generate(source, text + 1, mask).tokens - before).abs().max() > 1e-3
    other = source.clone()
    other[:, 5] += 1
    elsewhere = [i for i in range(N) if i != 5]
    changed = editor.generate(other, text, mask).tokens - before
    assert (changed[:, elsewhere].abs().amax((0, 2)) > 0).any()


@pytest.mark.parametrize(
    ("mode", "sees"),
    [
        ("autoregressive", lambda i, j: j < i),
        ("level", lambda i, j: level(j) < level(i)),
        ("prefilled", lambda i, j: False),
        ("delta", lambda i, j: False),
    ],
)
def test_what_of_the_target_each_position_sees(mode, sees):
    """By gradients: a position that saw what it is to write would learn nothing."""
    editor = tiny_editor(mode)
    target = torch.randn(1, N, CHANNELS, requires_grad=True)
    for i in (0, 2, 3, 10, 11, 26):
        written = editor(*given(1), target).tokens[0, i].square().sum()
        (grad,) = torch.autograd.grad(written, target, allow_unused=True)
        seen = torch.zeros(N) if grad is None else grad[0].abs().amax(-1)
        for j in range(N):
            assert (seen[j] > 0) == bool(sees(i, j)), (i, j)


def level(position):
    return next(number for number, span in enumerate(SLICES) if position in range(N)[span])


@pytest.mark.parametrize("counts", [(3, 2, 1), (32, 8, 4), (0, 2, 3), (2, 0, 3), (1,), (0, 0, 1)])
def test_positions_get_a_share_of_their_ancestor(counts):
    tree = Hierarchy(counts)
    table = above_table(tree)
    nodes = {p: n for n in tree.nodes() for p in range(n.start, n.stop)}
    levels = sorted({n.level for n in nodes.values()})
    for i, node in nodes.items():
        parents = table[i].nonzero().flatten().tolist()
        assert bool(parents) == (node.level != levels[0])
        for j in parents:
            steps = node.level - nodes[j].level
            assert levels.index(node.level) - levels.index(nodes[j].level) == 1
            assert (node.row >> steps, node.col >> steps) == (nodes[j].row, nodes[j].col)
        assert table[i].sum().item() == pytest.approx(float(bool(parents)))
    for j, node in nodes.items():  # nothing that was written above goes unread
        assert table[:, j].any() == (node.level != levels[-1])


def test_positions_of_a_root_go_to_its_children_one_to_one():
    tree = Hierarchy((32, 8))
    assert torch.equal(above_table(tree)[32:, :32], torch.eye(32))


def test_an_edit_says_what_it_did(editor):
    emb = embedding()
    result = editor.edit(emb, ["remove the red circle", "make the large one blue"])
    assert isinstance(result, EditResult)
    assert result.source is emb
    assert result.parent is None
    assert result.instructions == ("remove the red circle", "make the large one blue")
    assert torch.equal(result.embedding.pooled, emb.pooled)
    assert result.embedding.tokens.dtype == emb.tokens.dtype
    moved = (result.embedding.tokens != emb.tokens).any(-1)
    if editor.mode == "delta":
        assert torch.equal(result.edited, moved)
    else:
        assert moved.all()
        assert torch.equal(result.edited, result.change > TOUCHED)
    torch.testing.assert_close(
        result.change, relative_change(emb.tokens, result.embedding.tokens), rtol=0, atol=0
    )


def test_one_instruction_for_all_and_alone_as_in_a_batch(editor):
    emb = embedding(3)
    both = editor.edit(emb, "remove the red circle")
    one = editor.edit(emb.select(2), "  remove the red circle ")
    assert both.instructions == ("remove the red circle",) * 3
    torch.testing.assert_close(one.embedding.tokens, both.embedding.tokens[2:], **CLOSE)


def gated(bias):
    editor = tiny_editor("delta")
    with torch.no_grad():
        editor.gate.bias.fill_(bias)
        editor.gate.weight.zero_()
    return editor


def test_closed_gates_leave_every_bit():
    emb = embedding(dtype=torch.float64)  # not the editor's own dtype
    result = gated(-1.0).edit(emb, "remove the red circle")
    assert torch.equal(result.embedding.tokens, emb.tokens)
    assert not result.edited.any()
    assert result.touched == ((), ())
    assert result.change.max() == 0
    assert gated(1.0).edit(emb, "remove the red circle").edited.all()


def test_edits_chain_and_are_undone(editor):
    emb = embedding()
    first = editor.edit(emb, "remove the red circle")
    second = editor.edit(first, "add a blue square at c-4")
    third = editor.edit(second, "make the blue square red")
    assert third.parent is second
    assert third.source is second.embedding
    assert third.history == (first, second, third)
    assert third.undo() is second
    assert third.undo(2) is first
    assert third.undo(3) is emb
    assert first.undo() is emb
    for count in (0, 4, True, 1.5):
        with pytest.raises(ValueError, match="edits must be 1 to 3"):
            third.undo(count)
    long = third
    for _ in range(1200):
        long = EditResult(emb, emb, ("x",) * 2, long.edited, long)
    assert len(long.history) == 1203
    same = editor.edit(second.embedding, "make the blue square red")
    assert torch.equal(same.embedding.tokens, third.embedding.tokens)


def result_of(*edited):
    mask = torch.zeros(1, N, dtype=torch.bool)
    for path in edited:
        mask[:, TREE.span(path)] = True
    emb = embedding(1)
    return EditResult(emb, emb, ("x",), mask)


@pytest.mark.parametrize(
    ("edited", "boxes"),
    [
        ((), ()),
        (("/",), ((0, 0, 1, 1),)),
        (("/", "/1"), ((0, 0.5, 0.5, 1),)),
        (("/", "/1", "/1/0", "/2/3"), ((0, 0.5, 0.25, 0.75), (0.75, 0.25, 1, 0.5))),
        (("/1", "/2/3"), ((0, 0.5, 0.5, 1), (0.75, 0.25, 1, 0.5))),
    ],
)
def test_the_area_is_that_of_the_finest_nodes(edited, boxes):
    result = result_of(*edited)
    assert result.touched == (edited,)
    assert result.boxes == (boxes,)
    area = result.area(8, 8)
    assert area.shape == (1, 8, 8)
    assert area.float().mean() == sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes)


def test_a_patch_on_a_border_belongs_to_both_sides():
    area = result_of("/0").area(5, 3)[0]
    assert area.sum() == 3 * 2
    assert area[:3, :2].all()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_in_their_sizes(preset):
    with torch.device("meta"):
        editor = EmbeddingEditor.from_preset(preset, mode="delta", tokens_per_node=(2,))
    assert editor.config.width == PRESETS[preset]["width"]
    plain = isinstance(editor.embed, torch.nn.Identity)
    assert plain == (preset == "t5-xxl")  # as wide as FLUX's positions: nothing is projected
    assert isinstance(editor.project, torch.nn.Identity) == plain


def test_without_projections_it_writes_all_the_same(mode):
    editor = tiny_editor(mode, channels=24, text_features=24)
    source, text, mask = torch.randn(1, N, 24), torch.randn(1, 5, 24), torch.ones(1, 5).bool()
    assert editor.generate(source, text, mask).tokens.shape == (1, N, 24)


def test_it_writes_under_autocast(editor):
    with torch.autocast("cpu", torch.bfloat16):
        found = editor.generate(*given()).tokens
    torch.testing.assert_close(found.float(), editor.generate(*given()).tokens, rtol=0.1, atol=0.1)


def test_a_copy_has_the_same_weights_and_its_own_graphs(editor):
    other = copy.deepcopy(editor)
    assert other.graphs is not editor.graphs
    assert torch.equal(other.generate(*given()).tokens, editor.generate(*given()).tokens)


# what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens_per_node": (0, 0)}, "tokens_per_node"),
        ({"channels": 0}, "channels must be"),
        ({"mode": "both"}, "mode must be one of"),
        ({"num_layers": True}, "num_layers must be"),
        ({"adapter": 3}, "adapter must be"),
    ],
)
def test_configs_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        EmbeddingEditor(**{"width": 16, "num_layers": 1} | change)
    with pytest.raises(ValueError, match="name must be one of"):
        EmbeddingEditor.from_preset("t5-small")


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("", "says something"),
        (["remove", "  "], "says something"),
        (["remove"], "one for each of 2, got 1"),
        (["remove", 3], "says something"),
        (None, "must be a text or texts, got NoneType"),
        ("xyzzy the red circle", "words that its reader knows, got 'xyzzy the red circle'"),
        (["remove", "make " * 60], "must fit 40 tokens, got 61"),
    ],
)
def test_instructions_that_cannot_be(instruction, words):
    with pytest.raises(ValueError, match=words):
        tiny_editor().edit(embedding(), instruction)


def test_embeddings_that_are_not_the_editors():
    editor = tiny_editor()
    other = SemanticEmbedding(torch.randn(1, 5, CHANNELS), Hierarchy((1, 1)))
    with pytest.raises(ValueError, match=r"hierarchy \(3, 2, 1\), got \(1, 1\)"):
        editor.edit(other, "remove the red circle")
    with pytest.raises(ValueError, match="12 channels, got 7"):
        editor.edit(SemanticEmbedding(torch.randn(1, N, 7), TREE), "remove the red circle")
    with pytest.raises(
        ValueError, match="must be a SemanticEmbedding or an EditResult, got Tensor"
    ):
        editor.edit(torch.randn(1, N, CHANNELS), "remove the red circle")


def test_broken_weights_are_told(mode):
    editor = tiny_editor(mode)
    with torch.no_grad():
        editor.decoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="weights may be broken"):
        editor.edit(embedding(), "remove the red circle")


def test_training_needs_a_target_and_words_a_reader():
    for mode in ("autoregressive", "level"):
        with pytest.raises(ValueError, match=f"target must be given in mode {mode}"):
            tiny_editor(mode)(*given())
    editor = tiny_editor()
    editor.set_text_encoder(None)
    with pytest.raises(ValueError, match="no encoder of instructions"):
        editor.edit(embedding(), "remove the red circle")
    with pytest.raises(ValueError, match="must give 7 features, got 16"):
        tiny_editor(text_features=7).set_text_encoder(tiny_text_encoder())


def test_a_graph_needs_a_gpu_and_what_is_kept(editor):
    with pytest.raises(ValueError, match="on one CUDA device, got"):
        editor.generate(*given(), graph=True)
    with pytest.raises(ValueError, match="cache must be True where graph is True"):
        editor.generate(*given(), graph=True, cache=False)


# the reader of instructions


def test_texts_are_padded_to_few_lengths():
    reader = tiny_text_encoder()
    text, mask = reader(["remove one", "add a small red circle at c-4"])
    assert text.shape == (2, MULTIPLE, FEATURES)
    assert mask.sum(1).tolist() == [3, 9]
    alone, _ = reader(["remove one"])
    torch.testing.assert_close(alone[:, :3], text[:1, :3], **CLOSE)
    with pytest.raises(ValueError, match="max_length must be positive and known"):
        InstructionEncoder(reader.tokenizer, reader.model, max_length=0)
