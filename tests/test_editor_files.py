"""Editors and what reads for them, as files and as parts of a pipeline."""

import json

import pytest
import torch

from sda_fast import cuda_graphs
from sda_fast.cuda_graphs import GraphCache
from sda_fast.editors.llm import LLMEditor
from sda_fast.editors.script import ScriptEditor
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.t5_config import MODES
from sda_fast.editors.t5_decode import FEW, LIMIT, Writers
from sda_fast.editors.text import InstructionEncoder
from sda_fast.files import MANIFEST, check_manifest
from sda_fast.pipeline import SemanticPipeline
from sda_fast.weights import fingerprint

from .tape import TapePool
from .test_editor import given
from .tiny_editors import FEATURES, tiny_editor, tiny_text_encoder
from .tiny_encoders import same_state
from .tiny_flux import WIDTH
from .tiny_llm import tiny_llm_editor, write_base
from .tiny_pipeline import TREE, make_adapter, make_embedding, make_picture, make_pipe

WORDS = "remove the red circle"


@pytest.fixture
def saved(tmp_path):
    tiny_editor().save_pretrained(tmp_path / "editor")
    return tmp_path / "editor"


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, mode):
    editor = tiny_editor(mode, adapter="abc-def")
    editor.save_pretrained(tmp_path)
    again = EmbeddingEditor.from_pretrained(tmp_path).eval()
    assert same_state(editor, again)
    for name in ("mode", "channels", "width", "adapter"):
        assert again.config[name] == editor.config[name]
    assert again.tree == editor.tree
    assert torch.equal(again.generate(*given()).tokens, editor.generate(*given()).tokens)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    half = EmbeddingEditor.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_no_vocabulary_is_saved():
    assert not [name for name in tiny_editor().state_dict() if "embed_tokens" in name]


def spoil(saved, how):
    config, weights = saved / "config.json", saved / "diffusion_pytorch_model.safetensors"
    if how == "class":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet"}))
    elif how == "mode":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"mode": "both"}))
    elif how == "width":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"channels": 13}))
    elif how == "more":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    elif how == "torn":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    else:
        config.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("class", "must hold the model EmbeddingEditor, got the config of 'UNet'"),
        ("mode", "mode must be one of"),
        ("width", "do not fit its config"),
        ("more", "do not fit its config"),
        ("torn", "truncated"),
        ("pickle", "pickled weights"),
        ("none", "without config.json"),
    ],
)
def test_folders_that_are_no_editor(saved, how, words):
    spoil(saved, how)
    with pytest.raises((ValueError, OSError), match=words) as error:
        EmbeddingEditor.from_pretrained(saved)
    assert "editor" in str(error.value)


def test_no_folder_and_no_pickle(tmp_path):
    with pytest.raises(FileNotFoundError, match="editor must be a folder"):
        EmbeddingEditor.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="got None"):
        EmbeddingEditor.from_pretrained(None)
    with pytest.raises(ValueError, match="no pickle is written"):
        tiny_editor().save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_leaves_the_old_one(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("diffusers.models.modeling_utils.ModelMixin.save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        tiny_editor("level").save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_reader_of_instructions_comes_back(tmp_path):
    reader = tiny_text_encoder()
    reader.max_length = 12
    reader.save_pretrained(tmp_path)
    reader.save_pretrained(tmp_path)  # in the place of the first
    again = InstructionEncoder.from_pretrained(tmp_path)
    assert torch.equal(again([WORDS])[0], reader([WORDS])[0])
    assert {p.name for p in tmp_path.iterdir()} == {"text_encoder", "tokenizer"}
    with pytest.raises(ValueError, match="must fit 12 tokens, got 15"):
        again(["make the red one blue and the blue one red at once"] and ["red " * 14])
    (tmp_path / "text_encoder/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="must hold a t5 encoder, got 'bert'"):
        InstructionEncoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="instructions must be a folder"):
        InstructionEncoder.from_pretrained(tmp_path / "none")


# as CUDA graphs, recorded on the CPU


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPH_DEVICES", ("cpu",))
    return TapePool()


def on_tape(mode, pool):
    editor = tiny_editor(mode)
    editor.graphs, editor.writers = GraphCache(make_pool=pool), Writers(pool)
    return editor


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_says_the_same_again_and_again(mode, pool):
    editor = on_tape(mode, pool)
    for seed in (0, 1, 0):
        found, plain = (editor.generate(*given(seed=seed), graph=graph) for graph in (True, False))
        assert torch.equal(found.tokens, plain.tokens)
        assert mode != "delta" or torch.equal(found.gate, plain.gate)
    assert len(pool.tapes) == 1
    kept, copied = found.tokens, found.tokens.clone()
    editor.generate(*given(seed=2), graph=True)
    assert torch.equal(kept, copied)


def test_position_after_position_is_one_small_graph(pool):
    editor = on_tape("autoregressive", pool)
    editor.generate(*given(), graph=True)
    one, many = (tiny_editor("autoregressive", tokens_per_node=n) for n in ((4,), (9,)))
    lengths = []
    for editor in (one, many):
        editor.writers = Writers(pool)
        n = editor.tree.num_tokens
        source, text, mask = given()
        editor.generate(source[:, :n], text, mask, graph=True)
        lengths.append(len(pool.tapes[-1].operators.graph.nodes))
    assert lengths[0] == lengths[1]


def test_graphs_of_positions_are_few_and_never_stale(pool):
    editor = on_tape("autoregressive", pool)
    for batch in range(1, LIMIT + 2):
        editor.generate(*given(batch), graph=True)
    assert len(editor.writers._held) == LIMIT
    with torch.no_grad():
        editor.begin.add_(1)  # in place: seen as it is
        editor.positions.data = editor.positions.data.clone() * 2  # elsewhere: captured again
    taped = len(pool.tapes)
    found = editor.generate(*given(LIMIT + 1), graph=True).tokens
    assert torch.equal(found, editor.generate(*given(LIMIT + 1)).tokens)
    assert len(pool.tapes) == taped + 1
    editor.writers.clear()
    assert not editor.writers._held


@pytest.mark.parametrize("n", [1, FEW])
def test_a_few_positions_need_no_graph(pool, n):
    editor = tiny_editor("autoregressive", tokens_per_node=(n,))
    editor.writers = Writers(pool)
    source, text, mask = given()
    found = editor.generate(source[:, :n], text, mask, graph=True).tokens
    assert torch.equal(found, editor.generate(source[:, :n], text, mask).tokens)
    assert not pool.tapes


# in a pipeline


def pipe_with_editor(mode="delta", adapter=None):
    pipe = make_pipe()
    sizes = {"tokens_per_node": TREE.tokens_per_node, "channels": WIDTH}
    known = fingerprint(pipe.adapter) if adapter is None else adapter
    pipe.editor = tiny_editor(mode, **sizes, adapter=known)
    return pipe


def test_a_pipeline_edits_pictures_embeddings_and_edits():
    pipe = pipe_with_editor()
    by_picture = pipe.edit(make_picture(), WORDS)
    emb = pipe.encode(make_picture())
    assert torch.equal(by_picture.source.tokens, emb.tokens)
    by_embedding = pipe.edit(emb, WORDS)
    assert torch.equal(by_picture.embedding.tokens, by_embedding.embedding.tokens)
    again = pipe.edit(by_embedding, [WORDS])
    assert again.parent is by_embedding
    assert pipe.decode(again.embedding, steps=1, output="pt").isfinite().all()


def test_a_pipeline_is_saved_with_its_editor(tmp_path):
    pipe = pipe_with_editor()
    pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe/instructions/text_encoder").is_dir()
    check_manifest(tmp_path / "pipe")
    names = (tmp_path / "pipe" / MANIFEST).read_text()
    assert "editor/config.json" in names
    again = SemanticPipeline.from_pretrained(tmp_path / "pipe")
    found, expected = (p.edit(make_picture(), WORDS) for p in (again, pipe))
    assert torch.equal(found.embedding.tokens, expected.embedding.tokens)
    for dtype in (torch.bfloat16, torch.float16):  # the fingerprint fits any
        half = SemanticPipeline.from_pretrained(tmp_path / "pipe", dtype=dtype)
        assert half.editor.dtype == dtype
    assert SemanticPipeline.from_pretrained(tmp_path / "pipe", editor=False).editor is None
    make_adapter(seed=6).save_pretrained(tmp_path / "other")
    other = SemanticPipeline.from_pretrained(tmp_path / "pipe", adapter=tmp_path / "other")
    assert other.editor is None  # it knows the pipeline's own adapter alone
    with pytest.raises(ValueError, match="must have learned the embeddings of this adapter"):
        other.editor = pipe.editor
    pipe.editor = None
    pipe.save_pretrained(tmp_path / "pipe")
    assert SemanticPipeline.from_pretrained(tmp_path / "pipe").editor is None
    assert not (tmp_path / "pipe/editor").exists()


def test_an_editor_and_its_reader_come_from_folders_of_their_own(tmp_path):
    pipe = pipe_with_editor()
    pipe.editor.save_pretrained(tmp_path / "editor")
    pipe.editor.text_encoder.save_pretrained(tmp_path / "reader")
    expected = pipe.edit(make_picture(), WORDS)
    pipe.editor = None
    pipe.save_pretrained(tmp_path / "pipe")
    again = SemanticPipeline.from_pretrained(
        tmp_path / "pipe", editor=tmp_path / "editor", instructions=tmp_path / "reader"
    )
    found = again.edit(make_picture(), WORDS)
    assert torch.equal(found.embedding.tokens, expected.embedding.tokens)
    mute = SemanticPipeline.from_pretrained(
        tmp_path / "pipe", editor=tmp_path / "editor", text_encoder_2=None, tokenizer_2=None
    )
    with pytest.raises(ValueError, match="no encoder of instructions"):
        mute.edit(make_picture(), WORDS)


def test_flux_own_t5_reads_and_is_not_saved_twice(tmp_path):
    pipe = pipe_with_editor()
    reader = pipe.editor.text_encoder
    pipe.flux.register_modules(text_encoder_2=reader.model, tokenizer_2=reader.tokenizer)
    pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe/instructions").exists()
    again = SemanticPipeline.from_pretrained(tmp_path / "pipe")
    assert again.editor.text_encoder.model is again.flux.text_encoder_2
    found, expected = (p.edit(make_picture(), WORDS) for p in (again, pipe))
    assert torch.equal(found.embedding.tokens, expected.embedding.tokens)


def test_editors_of_other_embeddings_are_refused():
    pipe = make_pipe()
    with pytest.raises(ValueError, match="the pipeline has no editor"):
        pipe.edit(make_embedding(1), WORDS)
    with pytest.raises(ValueError, match=r"editor must be for embeddings of \(3, 2, 1\)"):
        pipe.editor = tiny_editor(channels=WIDTH, tokens_per_node=(4, 2))
    with pytest.raises(ValueError, match=f"{WIDTH} channels, got .* with 7"):
        pipe.editor = tiny_editor(channels=7)
    with pytest.raises(ValueError, match="learned those of 0123-456789"):
        pipe_with_editor(adapter="0123-456789")
    with pytest.raises(ValueError, match="must have a method edit, got str"):
        pipe.editor = "remove"
    assert pipe.editor is None
    pipe.editor = tiny_editor(channels=WIDTH)  # of an adapter that it does not name


def test_a_script_edits_in_a_pipeline_but_is_not_saved_with_it(tmp_path):
    pipe = make_pipe()
    pipe.editor = ScriptEditor()
    result = pipe.edit(make_picture(), '[{"op": "zero", "node": "/1"}]')
    assert not result.embedding["/1"].any()
    with pytest.raises(ValueError, match="must have a folder to be saved"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def test_a_language_model_edits_in_a_pipeline_and_is_saved_with_it(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)  # the language model is known by its name alone
    pipe = make_pipe()
    base = write_base(tmp_path / "base", positions=TREE.num_tokens)
    pipe.editor = tiny_llm_editor(
        base, shaken=True, tokens_per_node=TREE.tokens_per_node, channels=WIDTH,
        adapter=fingerprint(pipe.adapter),
    )  # fmt: skip
    expected = pipe.edit(make_picture(), "add a small red circle")
    pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe/instructions").exists()
    again = SemanticPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(again.editor, LLMEditor)
    found = again.edit(make_picture(), "add a small red circle")
    assert torch.equal(found.embedding.tokens, expected.embedding.tokens)


def test_moving_a_pipeline_moves_its_editor():
    pipe = pipe_with_editor().to(torch.bfloat16)
    assert pipe.editor.dtype == torch.bfloat16
    assert pipe.editor.text_encoder.model.dtype == torch.bfloat16
    assert pipe.editor.text_encoder.features == FEATURES


def test_fingerprints_tell_weights_apart_but_not_dtypes():
    adapter = make_pipe().adapter
    with torch.no_grad():
        for t in adapter.state_dict().values():
            t.copy_(t.bfloat16())
    known = fingerprint(adapter)
    assert fingerprint(adapter.to(torch.bfloat16)) == known
    with torch.no_grad():
        adapter.pooled.add_(1)
    assert fingerprint(adapter) != known
    assert fingerprint(adapter).split("-")[0] == known.split("-")[0]
    adapter.register_to_config(cross_attention_rope=False)  # the same weights mean something else
    assert fingerprint(adapter).split("-")[0] != known.split("-")[0]


def test_another_reader_of_instructions_is_refused():
    editor = tiny_editor(instructions=tiny_text_encoder().fingerprint)
    editor.set_text_encoder(tiny_text_encoder())
    with pytest.raises(ValueError, match="must be the one that the editor learned with"):
        editor.set_text_encoder(tiny_text_encoder(seed=9))
