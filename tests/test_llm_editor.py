import copy

import pytest
import torch

from sda_fast.editors.llm import LLMEditor
from sda_fast.editors.llm_base import load_base
from sda_fast.editors.result import Editor
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from tests.tiny_encoders import same_state
from tests.tiny_llm import CHANNELS, CLASSES, LIMIT, OPTIONS, TREE, tiny_llm_editor, write_base

POSITIONS = Hierarchy(TREE).num_tokens
CLOSE = {"rtol": 0, "atol": 1e-5}
LONG, SHORT = "move the big red circle to a place", "remove the circle"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: write_base(root / kind, kind) for kind in CLASSES}


@pytest.fixture
def base(bases):
    return bases["qwen2"]


def draw_source(batch=2):
    return torch.randn(batch, POSITIONS, CHANNELS)


def draw_emb(batch=2, dtype=torch.float32):
    pooled = torch.randn(batch, 3)
    return SemanticEmbedding(draw_source(batch).to(dtype), Hierarchy(TREE), pooled)


def frozen(editor):
    own = {id(p) for p in editor.parameters()}
    return {name: p for name, p in editor.llm.named_parameters() if id(p) not in own}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_learns_what_instructions_mean_and_leaves_the_model_as_it_is(bases, kind):
    editor = tiny_llm_editor(bases[kind], lora_rank=8).train()
    before = {name: weight.clone() for name, weight in frozen(editor).items()}
    texts = ["remove the circle", "paint the circle"] * 4
    text, mask = editor.encode_text(texts)
    sign = torch.tensor([-1.0, 1.0] * 4)[:, None, None]
    optimizer = torch.optim.AdamW(editor.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        source = draw_source(8)
        target = source + sign  # the change hangs on the words alone
        loss = (editor(source, text, mask, target).tokens - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=1e-3)
    assert sum(losses[-5:]) / 5 < 0.05
    assert all(p.grad is not None and p.grad.any() for p in editor.parameters())
    after = frozen(editor)
    assert not any(p.requires_grad or p.grad is not None for p in after.values())
    assert len(before) >= 20
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert not editor.llm.training


def test_what_learned_nothing_changes_nothing(base):
    emb = draw_emb()
    result = tiny_llm_editor(base).edit(emb, SHORT)
    assert torch.equal(result.embedding.tokens, emb.tokens)
    assert not result.edited.any()


def test_parameters_and_state_are_what_learns(base):
    editor = tiny_llm_editor(base)
    names = {name for name, p in editor.named_parameters() if p.requires_grad}
    assert names == set(editor.state_dict()) == set(dict(editor.named_parameters()))
    own = {"embed.weight", "embed.bias", "positions", "placeholders", "project.weight"}
    assert names - {n for n in names if n.startswith("lora.")} == own | {"project.bias"}
    linears = 2 * 7  # q, k, v, o, gate, up and down of two layers; the head has none
    assert len(names) == 6 + 2 * linears
    assert {p.shape[0] for n, p in editor.named_parameters() if n.endswith(".A.weight")} == {4}


def test_a_copy_shares_what_is_frozen_and_nothing_else(base):
    editor = tiny_llm_editor(base, shaken=True)
    average = copy.deepcopy(editor).requires_grad_(False)
    twin = copy.deepcopy(average)
    assert same_state(twin, editor)
    shared = {name for name, p in frozen(twin).items() if p is dict(frozen(editor))[name]}
    assert shared == set(frozen(editor))
    inputs = draw_source(), *editor.encode_text([LONG, SHORT])
    before = editor.generate(*inputs).tokens
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    for kept in (editor, average):
        assert torch.equal(kept.generate(*inputs).tokens, before)
    assert torch.equal(twin.generate(*inputs).tokens, inputs[0])
    twin.load_state_dict(editor.state_dict())
    assert torch.equal(twin.generate(*inputs).tokens, before)


def test_reads_the_placeholders_at_the_end_of_the_prompt(bases):
    editor = tiny_llm_editor(bases["llama"], shaken=True)
    source, (text, mask) = draw_source(1), editor.encode_text([LONG])
    with torch.no_grad():
        words = editor.llm.model.embed_tokens(text)
        known, asked = editor.embed(source) + editor.positions, editor.placeholders[None]
        prompt = torch.cat([words, known, asked], dim=1)
        hidden = editor.llm(inputs_embeds=prompt, output_hidden_states=True).hidden_states[-1]
        wanted = source + editor.project(hidden[:, 8 + POSITIONS :])
    torch.testing.assert_close(editor.generate(source, text, mask).tokens, wanted, **CLOSE)


@pytest.mark.parametrize("kind", CLASSES)
def test_alone_as_in_a_batch_wherever_the_padding_is(bases, kind):
    editor = tiny_llm_editor(bases[kind], shaken=True)
    source, (text, mask) = draw_source(), editor.encode_text([LONG, SHORT])
    assert mask.sum(dim=1).tolist() == [8, 3]
    batch = editor.generate(source, text, mask).tokens
    one, (words, _) = source[1:], editor.encode_text([SHORT])
    alone = editor.generate(one, words, torch.ones(1, 3, dtype=torch.bool)).tokens
    torch.testing.assert_close(batch[1:], alone, **CLOSE)
    for places in ([0, 1, 2], [5, 6, 7], [1, 4, 6]):
        padded, said = torch.full((1, 8), 7), torch.zeros(1, 8, dtype=torch.bool)
        padded[:, places], said[:, places] = words, True
        torch.testing.assert_close(editor.generate(one, padded, said).tokens, alone, **CLOSE)
    other = editor.generate(one, words.flip(1), torch.ones(1, 3, dtype=torch.bool)).tokens
    assert (other - alone).abs().max() > 1e-3


def test_edits_chain_and_keep_dtype_and_pooled(base):
    editor = tiny_llm_editor(base, shaken=True)
    assert isinstance(editor, Editor)
    emb = draw_emb(dtype=torch.bfloat16)
    first = editor.edit(emb, [LONG, f" {SHORT} "])
    second = editor.edit(first, SHORT)
    assert first.instructions == (LONG, SHORT)
    assert second.parent is first
    assert second.source is first.embedding
    assert [r.instructions for r in second.history] == [(LONG, SHORT), (SHORT, SHORT)]
    assert second.undo() is first
    assert second.undo(2) is emb
    new = second.embedding
    assert new.tokens.dtype == torch.bfloat16
    assert new.pooled is emb.pooled
    assert torch.equal(first.edited, first.change > 0.3)
    text, mask = editor.encode_text([LONG, SHORT])
    wanted = editor.generate(emb.tokens.float(), text, mask).tokens
    assert torch.equal(first.embedding.tokens, wanted.bfloat16())
    assert not new.tokens.requires_grad


def test_a_model_in_bf16_learns_in_f32(base):
    editor = tiny_llm_editor(base, dtype=torch.bfloat16)
    assert {p.dtype for p in frozen(editor).values()} == {torch.bfloat16}
    assert {p.dtype for p in editor.parameters()} == {torch.float32}
    torch.nn.init.normal_(editor.project.weight)
    text, mask = editor.encode_text([LONG, SHORT])
    with torch.autocast("cpu", torch.bfloat16):
        prediction = editor(draw_source(), text, mask)
    assert prediction.tokens.dtype == torch.float32
    prediction.tokens.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in editor.parameters())
    editor.to(torch.float64)
    assert {p.dtype for p in (*editor.parameters(), *editor.llm.parameters())} == {torch.float64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens_per_node": (0,)}, "tokens_per_node"),
        ({"channels": 1.5}, "channels must be an integer"),
        ({"lora_rank": 0}, "lora_rank must be an integer"),
        ({"max_length": 0}, "max_length must be an integer"),
        ({"adapter": 5}, "adapter must be a fingerprint"),
        ({"max_length": LIMIT + 1}, "base must take a prompt of 23 tokens"),
    ],
)
def test_arguments_that_cannot_be_are_refused(base, change, words):
    arguments = {"tokens_per_node": TREE, "channels": CHANNELS, **OPTIONS, **change}
    with pytest.raises(ValueError, match=words):
        LLMEditor.from_base(base, **arguments)


def test_a_base_is_one_editors_alone(base):
    loaded = load_base(base)
    LLMEditor(loaded, TREE, CHANNELS, **OPTIONS)
    with pytest.raises(ValueError, match="base must be one editor's alone"):
        LLMEditor(loaded, TREE, CHANNELS, **OPTIONS)


def test_bad_edits_are_refused_by_name(base):
    editor, emb = tiny_llm_editor(base), draw_emb()
    foreign = SemanticEmbedding(torch.randn(1, 6, CHANNELS), Hierarchy((6,)))
    broken = draw_emb()
    broken.tokens[0, 0, 0] = torch.nan
    for given, instruction, words in (
        (emb, " ", "instruction must be a text"),
        (emb, [SHORT], "one for each of 2, got 1"),
        (emb, "red " * (LIMIT + 1), f"instruction must fit {LIMIT} tokens, got {LIMIT + 1}"),
        (foreign, SHORT, r"hierarchy \(2, 1\), got \(6,\)"),
        (SemanticEmbedding(torch.randn(1, 6, 9), Hierarchy(TREE)), SHORT, "8 channels, got 9"),
        (broken, SHORT, "emb must be finite, got 1"),
        (emb.tokens, SHORT, "emb must be a SemanticEmbedding"),
    ):
        with pytest.raises(ValueError, match=words):
            editor.edit(given, instruction)
    for texts in ([], SHORT, [SHORT, "  "]):
        with pytest.raises(ValueError, match="instruction must be"):
            editor.encode_text(texts)
    torch.nn.init.constant_(editor.project.bias, torch.inf)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        editor.edit(emb, SHORT)


def test_tensors_that_do_not_fit_are_refused_by_name(base):
    editor, source = tiny_llm_editor(base), draw_source()
    text, mask = editor.encode_text([LONG, SHORT])
    for inputs, words in (
        ((source[:, 1:], text, mask), r"source must be \[B, 6, 8\], got \[2, 5, 8\]"),
        ((source[..., 1:], text, mask), r"source must be .* got \[2, 6, 7\]"),
        ((source, text.float(), mask), "text must be int64"),
        ((source, text[:1], mask), "text must be int64"),
        ((source, text, mask.long()), "mask must be bool"),
        ((source, text, mask[:, 1:]), "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=words):
            editor(*inputs)
