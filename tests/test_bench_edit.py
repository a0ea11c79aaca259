"""``bench edit``: ways to edit side by side, with tiny models and with pictures that are known."""

import io
import math
from contextlib import redirect_stdout
from itertools import pairwise

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from bench import edit_cases
from bench.__main__ import main as bench
from bench.bootstrap import bootstrap
from bench.edit import load_editors, measure
from bench.edit_cases import EditCase, case_names, choose, remembered, unchanged
from bench.edit_report import BASELINES
from bench.quality import SEED_STEP
from bench.records import read_records
from bench.rf_inversion import Control, RFInversion
from sda_fast.editors.result import EditResult
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.text import InstructionEncoder
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from sda_fast.scenes import edits as grammar
from sda_fast.scenes.edit_score import Shown
from sda_fast.scenes.edits import OPERATIONS, sample_edits
from sda_fast.scenes.models import build_tokenizer
from sda_fast.scenes.render import render
from sda_fast.scenes.world import SMALL

from .tiny_scenes import SIZE, WIDTH, tiny_scenes_pipeline

TEXT = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def text_encoder(tokenizer):
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **TEXT)).eval()


def tiny_editor(mode, gate=None, **config):
    """One that every gate of is open or closed."""
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "ff_width": 16}
    sizes |= {"channels": WIDTH, "text_features": WIDTH, "tokens_per_node": (4, 2, 1)}
    editor = EmbeddingEditor(mode=mode, **(sizes | config)).eval()
    if gate is not None:
        torch.nn.init.zeros_(editor.gate.weight)
        torch.nn.init.constant_(editor.gate.bias, gate)
    return editor


@pytest.fixture(scope="module")
def pipe():
    """Reads captions, and edits by an editor all of whose gates are open."""
    torch.manual_seed(0)
    pipe = tiny_scenes_pipeline()
    tokenizer = build_tokenizer(SMALL)
    pipe.flux.register_modules(text_encoder_2=text_encoder(tokenizer), tokenizer_2=tokenizer)
    words = build_tokenizer(SMALL, grammar.WORDS)
    editor = tiny_editor("delta", gate=9.0)
    editor.set_text_encoder(InstructionEncoder(words, text_encoder(words)))
    pipe.editor = editor
    return pipe


@pytest.fixture(scope="module")
def folders(pipe, tmp_path_factory):
    """The pipeline, and two more editors beside what reads instructions for them."""
    root = tmp_path_factory.mktemp("models")
    pipe.save_pretrained(root / "model")
    pipe.editor.text_encoder.save_pretrained(root / "instructions")
    tiny_editor("prefilled").save_pretrained(root / "plain")
    tiny_editor("delta", gate=-9.0).save_pretrained(root / "closed")
    return root


def run(options, *rest):
    """The command in this process: its exit code and what it printed."""
    arguments = [str(part) for option in options.items() for part in option]
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as stop:
        bench(["edit", *arguments, *rest])
    return stop.value.code, " ".join(said.getvalue().split())


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    """What the command wrote, and what it printed."""
    out = tmp_path_factory.mktemp("results") / "new" / "edit.jsonl"
    options = {"--model": folders / "model", "--out": out}
    sizes = {"--scenes": 4, "--seeds": 2, "--steps": 2}
    names = [f"--editor=plain={folders / 'plain'}", f"--editor=closed={folders / 'closed'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.quality.INVERSION_STEPS", 2)
        patch.setattr("bench.bootstrap.RESAMPLES", 50)
        code, said = run(options | sizes, *names)
    assert code == 0, said
    return read_records(out), said


def named(records):
    return [f"{r['part']}/{r['variant']}" for r in records if r["step"] <= 1]


def test_every_case_is_measured(results):
    records, said = results
    assert named(records) == case_names(["shipped", "plain", "closed"])
    chains = [r for r in records if r["part"] == "chains"]
    assert [r["step"] for r in chains] == 4 * [1, 2, 3, 4, 5]
    sizes = {f"{r['part']}/{r['variant']}": r["n"] for r in records}
    assert sizes["test/caption"] == 4
    assert sizes["held_out_pairs/closed"] == sizes["held_out_count/rf-inversion"] == 2
    assert sizes["test/inversion"] == sizes["chains/plain"] == 1
    assert "aim of the editor shipped" in said


def test_the_records_say_what_was_measured(results):
    for r in results[0]:
        assert (r["suite"], r["scenes"], r["seeds"], r["steps"]) == ("edit", 4, 2, 2)
        assert sum(o["n"] for o in r["operations"].values()) == r["n"]
        for metrics in (r["metrics"], *(o["metrics"] for o in r["operations"].values())):
            assert {"success", "preserved", "kept"} <= metrics.keys()
            for metric in metrics.values():
                assert metric["low"] - 1e-9 <= metric["mean"] <= metric["high"] + 1e-9
    assert len({(r["decoder"], r["reader"], r["run"]) for r in results[0]}) == 1
    test = {r["variant"]: r for r in results[0] if r["part"] == "test"}
    weights = {name: test[name]["editor"] for name in ("shipped", "plain", "closed")}
    assert len(set(weights.values())) == 3
    assert [test[name]["mode"] for name in weights] == ["delta", "prefilled", "delta"]
    assert test["rf-inversion"]["control"] == {"gamma": 0.5, "eta": 1.0, "stop": 0.15}
    assert not any("editor" in test[name] for name in BASELINES)


def test_without_an_edit_nothing_changes_and_nothing_succeeds(results):
    """Neither where none is made, nor where every gate is closed."""
    for r in results[0]:
        if r["variant"] not in ("source", "closed"):
            continue
        means = {name: metric["mean"] for name, metric in r["metrics"].items()}
        assert (means["kept"], means["same"]) == (1, 1)
        assert not {"psnr", "leakage"} & means.keys()
        for operation, found in r["operations"].items():
            if operation != "remove":  # this decoder never drew what is to go
                assert found["metrics"]["success"]["mean"] == 0


def test_an_edit_changes_positions_and_pictures(results):
    for r in results[0]:
        if r["variant"] in ("shipped", "plain"):
            assert r["metrics"]["same"]["mean"] == 0
        if r["variant"] not in ("source", "closed"):
            assert r["metrics"]["psnr"]["mean"] < 100
            assert r["metrics"]["leakage"]["mean"] > 0
        assert ("same" in r["metrics"]) == (r["variant"] not in (*BASELINES,)[1:])


def known_case(after, number=30, **more):
    """Edits whose pictures are drawn by the renderer: after says of which scene."""
    edits = sample_edits(SMALL, "test", 9, number)
    asked = []

    def look(scenes):
        shown = Shown.of(render(scenes, SIZE), SMALL)

        def call(rows, seeds):
            asked.append((rows, seeds))
            return Shown(shown.pictures[rows], shown.scenes[rows])

        return call

    drawn, source = look([after(edit) for edit in edits]), look([edit.source for edit in edits])
    return EditCase("test", "known", edits, drawn, source, **more), asked


def test_a_case_of_known_pictures_has_known_rates(monkeypatch):
    monkeypatch.setattr("bench.edit.BATCH", 12)
    ticks = []
    same = torch.linspace(0, 1, 30, dtype=torch.float64)
    case, asked = known_case(lambda edit: edit.target, same=same)
    metrics, operations = measure(case, 2, ticks.append)
    for name, mean in (("success", 1), ("preserved", 1), ("kept", 1), ("over_edit", 0)):
        assert metrics[name] == {"mean": mean, "low": mean, "high": mean}
    assert metrics["same"]["mean"] == pytest.approx(0.5)
    assert metrics["same"]["low"] < 0.45
    assert metrics["leakage"]["mean"] < 1e-6
    assert sum(ticks) == 60
    assert operations.keys() <= set(OPERATIONS)
    for name, found in operations.items():
        mine = [i for i, edit in enumerate(case.edits) if edit.operation == name]
        assert found["n"] == len(mine)
        assert found["metrics"]["same"]["mean"] == pytest.approx(same[mine].mean().item())
    seeds = [seed for _, seeds in asked[::2] for seed in seeds]
    assert seeds == [draw * SEED_STEP + i for draw in range(2) for i in range(30)]
    assert asked[::2] == asked[1::2]  # the same noise with the edit and without


def test_a_case_that_half_succeeds_says_so():
    half = lambda edit: edit.target if edit.operation in ("add", "remove") else edit.source
    case, _ = known_case(half)
    metrics, operations = measure(case, 1, lambda n: None)
    share = sum(edit.operation in ("add", "remove") for edit in case.edits) / 30
    assert metrics["success"]["mean"] == pytest.approx(share)
    assert metrics["success"]["low"] < share < metrics["success"]["high"]
    assert operations["add"]["metrics"]["success"]["mean"] == 1
    assert operations["recolour"]["metrics"]["success"]["mean"] == 0
    assert "same" not in metrics


def test_an_interval_is_of_those_resamples_that_have_the_metric():
    sums = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)

    def rates(v):
        ratio = v[0] / v[1] if v[1] else math.inf
        return {"share": v[1] / v[0], "ratio": ratio, "nothing": math.nan, "endless": math.inf}

    found = bootstrap(sums, rates)
    assert list(found) == ["share", "ratio"]
    assert found["share"] == {"mean": pytest.approx(1 / 3), "low": 0, "high": 1}
    # of three draws one to three are the third; where none is there is no ratio
    assert found["ratio"] == {"mean": 3, "low": 1, "high": 3}


def test_what_was_drawn_once_is_not_drawn_again():
    called = []
    draw = remembered(lambda rows, seeds: called.append(rows) or len(called))
    assert draw(slice(0, 2), [0, 1]) == draw(slice(0, 2), [0, 1]) == 1
    assert draw(slice(0, 2), [7, 8]) == 2
    assert draw(slice(2, 4), [0, 1]) == 3


def test_positions_count_as_same_bit_for_bit_only():
    tree = Hierarchy((4,))
    source = torch.randn(2, 4, 3)
    new = source.clone()
    new[0, 1, 2] = new[0, 1, 2].nextafter(torch.tensor(9.0))
    new[1] += 1
    pair = [SemanticEmbedding(t, tree) for t in (new, source)]
    result = EditResult(*pair, ("a", "b"), torch.ones(2, 4, dtype=torch.bool))
    assert unchanged(result).tolist() == [0.75, 0.0]


def test_a_chain_goes_on_from_what_came_out(pipe):
    """Each edit is given the result of the one before, and its picture is the unedited one."""
    given = []

    class Spy:
        mode, text_encoder = "spy", None

        def edit(self, emb, instruction):
            given.append((emb, instruction))
            source = emb.embedding if isinstance(emb, EditResult) else emb
            new = SemanticEmbedding(source.tokens + 1, source.tree, source.pooled)
            everything = torch.ones(source.tokens.shape[:2], dtype=torch.bool)
            return EditResult(new, source, tuple(instruction), everything)

    drawer = edit_cases.Suite(pipe, None, 4, 1, 2, 1)
    suite = edit_cases.EditSuite(drawer, {"spy": Spy()}, ["chains/spy"], 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_cases, "describe", lambda editor: {})
        cases = list(suite.cases(None))
    assert [case.step for case in cases] == [1, 2, 3, 4, 5]
    for case, later in pairwise(cases):
        assert later.before is case.after
        assert [edit.source for edit in later.edits] == [edit.target for edit in case.edits]
    assert [words for _, words in given] == [[e.instruction for e in c.edits] for c in cases]
    first = given[0][0].tokens
    for step, (emb, _) in enumerate(given[1:], 1):
        torch.testing.assert_close(emb.embedding.tokens, first + step)


def test_cases_are_chosen_by_name_and_pattern():
    names = case_names(["mine"])
    assert choose("all", names) == names
    assert choose("caption", names) == [n for n in names if n.endswith("/caption")]
    assert choose("chains/*,test/mine", names) == ["test/mine", "chains/target", "chains/mine"]
    assert choose("mine,*/mine", names) == choose("mine", names)
    for text in ("nobody", "test/nobody", "held_out_pairs/inversion", "caption,"):
        with pytest.raises(ValueError, match="variants must be of test/source"):
            choose(text, names)


def test_an_editor_is_read_for_by_what_lies_beside_it(folders, pipe, tmp_path):
    found = load_editors([f"plain={folders / 'plain'}"], pipe)
    assert list(found) == ["shipped", "plain"]
    assert found["shipped"] is pipe.editor
    assert found["plain"].text_encoder is not pipe.editor.text_encoder
    (tmp_path / "alone").symlink_to(folders / "plain")
    alone = load_editors([f"plain={tmp_path / 'alone'}"], pipe)["plain"]
    assert alone.text_encoder is pipe.editor.text_encoder
    assert not alone.training


@pytest.mark.parametrize(
    ("editor", "says"),
    [
        ("plain", "editor must be NAME=FOLDER, got 'plain'"),
        ("=plain", "editor must be NAME=FOLDER"),
        ("a/b=plain", "editor must be NAME=FOLDER"),
        ("caption={root}/plain", "a name of its own, got 'caption' again"),
        ("shipped={root}/plain", "a name of its own, got 'shipped' again"),
        ("new={root}/nowhere", "nowhere"),
        ("new={root}/other", "editor must be for embeddings of (4, 2, 1)"),
        ("new={root}/stranger", "must have learned the embeddings of this adapter"),
    ],
)
def test_an_editor_that_does_not_fit_is_refused_before_anything_runs(
    editor, says, folders, tmp_path
):
    tiny_editor("prefilled", tokens_per_node=(4, 3)).save_pretrained(folders / "other")
    tiny_editor("prefilled", adapter="aaaa-bbbb").save_pretrained(folders / "stranger")
    out = tmp_path / "edit.jsonl"
    options = {"--model": folders / "model", "--out": out}
    code, said = run(options, f"--editor={editor.format(root=folders)}")
    assert code == 2
    assert says in said
    assert not out.exists()


def test_unknown_variants_are_refused(folders, tmp_path):
    options = {"--model": folders / "model", "--out": tmp_path / "edit.jsonl"}
    code, said = run(options | {"--variants": "caption,nobody"})
    assert code == 2
    assert "got 'nobody'" in said
    assert not any(tmp_path.iterdir())


# --- RF inversion -----------------------------------------------------------------------------


@pytest.fixture
def pictures():
    return render([edit.source for edit in sample_edits(SMALL, "test", 9, 2)], SIZE)


def words(number=2):
    return torch.randn(number, 5, WIDTH)


def rf(pipe, **control):
    return RFInversion(pipe, 8, Control(**control))


def test_full_control_goes_straight_to_the_noise_and_back(pipe, pictures):
    """Whatever the decoder says: gamma 1 ends at y1, eta 1 at the picture."""
    straight = rf(pipe, gamma=1.0, eta=1.0, stop=1.0)
    noise = straight.invert(pictures, words(1), [3, 4])
    for row, seed in zip(noise, (3, 4), strict=True):
        wanted = torch.randn(row.shape, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(row, wanted, rtol=0, atol=1e-4)
    back = straight.draw(noise, pictures, words())
    torch.testing.assert_close(back, pictures, rtol=0, atol=1e-4)


def test_without_control_the_equations_are_the_decoders_own(pipe, pictures):
    """Then the reverse is the sampler of the pipeline, and the seed of the forward is not read."""
    free, text = rf(pipe, gamma=0.0, eta=0.0), words()
    noise = free.invert(pictures, words(1), [3, 4])
    torch.manual_seed(9)
    torch.testing.assert_close(free.invert(pictures, text[:1] * 0, [3, 4]).shape, noise.shape)
    assert free.invert(pictures, text, [5, 6]).equal(free.invert(pictures, text, [3, 4]))
    drawn = pipe.flux(
        prompt_embeds=text,
        pooled_prompt_embeds=torch.zeros(2, pipe.flux.transformer.config.pooled_projection_dim),
        height=SIZE,
        width=SIZE,
        num_inference_steps=8,
        latents=noise,
        output_type="pt",
    ).images
    torch.testing.assert_close(free.draw(noise, pictures, text), drawn, rtol=0, atol=1e-5)


def test_control_holds_the_picture_for_its_part_of_the_steps(pipe, pictures):
    text, noise = words(), torch.randn(2, 64, 48)
    off = [
        (rf(pipe, eta=1.0, stop=stop).draw(noise, pictures, text) - pictures).abs().mean().item()
        for stop in (0.0, 0.5, 1.0)
    ]
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-4
    alone = rf(pipe).draw(noise[:1], pictures[:1], text[:1])
    torch.testing.assert_close(rf(pipe).draw(noise, pictures, text)[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gamma", "eta", "stop"])
def test_control_out_of_its_range_is_refused(name):
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"{name} must be from 0 to 1"):
            Control(**{name: value})
