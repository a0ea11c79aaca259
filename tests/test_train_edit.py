"""Editors of scenes learn behind a frozen adapter, in every mode."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from sda_fast.editors.prediction import Prediction
from sda_fast.editors.result import TOUCHED, relative_change
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.t5_config import PRESETS
from sda_fast.editors.text import InstructionEncoder
from sda_fast.losses import edit_loss
from sda_fast.pipeline import SemanticPipeline
from sda_fast.scenes import edits
from sda_fast.scenes.edits import sample_edits
from sda_fast.scenes.models import MASK
from sda_fast.scenes.render import render
from sda_fast.scenes.world import SMALL
from sda_fast.weights import digest, fingerprint
from tests.tiny_editing import TINY, build, newest, tiny, write_parts
from tests.tiny_encoders import same_state
from tests.train_processes import Run, assert_equal_runs, tree_of
from train.__main__ import app
from train.checkpoint import read_state
from train.config import override
from train.edit_data import edit_batches
from train.export import export_run
from train.loop import train
from train.ranks import Ranks
from train.recipes import RECIPES
from train.report import read_log
from train.scenes_export import export_editor
from train.state import State

MODES = ("autoregressive", "prefilled", "level", "delta")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """A run's page is not drawn: it takes most of the time of so short a run."""
    monkeypatch.setattr("train.view.plot_run", lambda folder: None)


@pytest.mark.parametrize("mode", MODES)
def test_an_editor_trains_while_all_around_it_stays_as_it_was(mode, parts, tmp_path):
    config = tiny(f"scenes-edit-{mode}", tmp_path, parts, "flow=0.5")
    stage = build(config)
    frozen = stage.behind.frozen
    others = [stage.behind.adapter, frozen.flux.transformer, frozen.encoder, stage.read_text.model]
    before = [digest(other) for other in others]
    start = {name: t.clone() for name, t in stage.trained.state_dict().items()}
    train(config, stage)
    assert [digest(other) for other in others] == before
    trained = stage.trained.state_dict()
    assert all(not torch.equal(trained[name], t) for name, t in start.items())

    rows = read_log(config.folder)
    row = rows[2]
    parts_of_loss = [row["edit"], row.get("gate", 0), config.flow * row["flow"]]
    assert row["loss"] == pytest.approx(sum(parts_of_loss), rel=1e-4)
    assert ("gate_share" in row) == ("gate" in row) == (mode == "delta")
    assert {"eval/loss", "eval/edit", "eval/flow", "eval/written", "eval/unedited"} <= row.keys()
    # one pass writes what it was taught; several do not, once their own words are read
    assert (row["eval/written"] == row["eval/edit"]) == (mode == "prefilled")
    assert (config.folder / "sheets/000002.png").is_file()

    editor = EmbeddingEditor.from_pretrained(config.folder / "export/editor")
    assert editor.config["adapter"] == fingerprint(stage.behind.adapter)
    averaged = read_state(newest(config), "ema/editor.")
    assert all(torch.equal(t, averaged[name]) for name, t in editor.state_dict().items())
    assert not any("text_encoder" in name for name in averaged)


def test_what_an_editor_learns_is_what_it_is_judged_by(parts, tmp_path):
    """The loss of a few edits falls far below that of leaving them as they are."""
    config = tiny("scenes-edit-prefilled", tmp_path, parts, "adamw_lr=1e-2", "decoder=none")
    stage = build(config)
    assert stage.sheet() is None
    batch = edit_batches(config, "train", 1, [range(4)])[0]
    state = State(config, stage, Ranks())
    for step in range(1, 61):
        losses, _ = state.backward([batch])
        state.update(step)
        state.forget()
    source, target = stage.tokens(batch)
    assert losses["edit"] < 0.3 * edit_loss(source, target)


def told(stage, gate):
    """(batch, source, target, a prediction with this gate) of a stage in mode delta."""
    batch = edit_batches(stage.config, "train", 1, [range(4)])[0]
    source, target = stage.tokens(batch)
    torch.manual_seed(0)
    tokens = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    logits = gate(relative_change(source, target) > TOUCHED).requires_grad_()
    return batch, source, target, Prediction(tokens, logits)


def test_a_gate_is_taught_and_closed_positions_pay_nothing(parts, tmp_path):
    stage = build(tiny("scenes-edit-delta", tmp_path, parts))
    batch, source, target, found = told(stage, lambda opened: 2 * opened.float() - 1)
    opened = relative_change(source, target) > TOUCHED
    assert 0 < opened.float().mean() < 1
    losses = stage.measure(batch, source, target, found)
    assert losses["edit"] == edit_loss(found.tokens, target, opened)
    sure = torch.nn.functional.softplus(torch.tensor(-1.0))
    torch.testing.assert_close(losses["gate"], sure)
    torch.testing.assert_close(losses["gate_share"], opened.float().mean())
    losses["loss"].backward()
    assert torch.equal(found.tokens.grad.any(-1), opened)
    # every logit is to go on in the direction that it has
    assert torch.equal(found.gate.grad < 0, opened)


def test_the_decoder_sees_what_the_gate_lets_through(parts, tmp_path, monkeypatch):
    stage = build(tiny("scenes-edit-delta", tmp_path, parts, "flow=1"))
    pattern = torch.tensor([1.0, -1.0] * 14)
    batch, source, target, found = told(stage, lambda opened: pattern.repeat(4, 1))
    seen = []

    def flow(batch, tokens):
        seen.append(tokens)
        return tokens.square().sum()

    monkeypatch.setattr(stage, "flow", flow)
    losses = stage.measure(batch, source, target, found)
    assert torch.equal(seen[0], found.over(source))
    only_flow = losses["loss"] - losses["edit"] - losses["gate"]
    assert only_flow.item() == pytest.approx(seen[0].square().sum().item(), rel=1e-5)
    gate, tokens = torch.autograd.grad(seen[0].square().sum(), [found.gate, found.tokens])
    assert torch.equal(tokens.any(-1), pattern.repeat(4, 1) > 0)
    soft = found.gate.sigmoid()
    wanted = (2 * seen[0] * (found.tokens - source)).sum(-1) * soft * (1 - soft)
    torch.testing.assert_close(gate, wanted)


def test_flow_is_held_to_the_picture_of_the_target(parts, tmp_path):
    stage = build(tiny("scenes-edit-level", tmp_path, parts, "flow=1"))
    batch = edit_batches(stage.config, "train", 1, [range(4)])[0]
    _, target = stage.tokens(batch)
    same = stage.flow(batch, target)
    for name, counts in (("source", False), ("target", True)):
        other = batch.tensors | {name: batch.tensors[name].flip(0)}
        assert (stage.flow(replace(batch, tensors=other), target) != same) == counts


@pytest.mark.parametrize("mode", ["autoregressive", "delta"])
def test_a_step_is_the_same_however_it_is_shared_out(mode, parts, tmp_path):
    stage = build(tiny(f"scenes-edit-{mode}", tmp_path, parts, "flow=0.5"))
    whole = stage.losses(stage.batches_of(3, [range(4)])[0])
    halves = [stage.losses(b) for b in stage.batches_of(3, [range(2), range(2, 4)])]
    for name, value in whole.items():
        torch.testing.assert_close(value, (halves[0][name] + halves[1][name]) / 2)
    assert stage.batches_of(4, [range(4)])[0].texts != stage.batches_of(3, [range(4)])[0].texts


def test_held_out_edits_are_those_of_the_test_split(parts, tmp_path):
    stage = build(tiny("scenes-edit-delta", tmp_path, parts, "decoder=none", "eval_pictures=6"))
    assert stage.data.unseen_shares(4) == [range(4), range(4, 6)]
    batch = stage.data.held_out(range(4, 6))
    assert batch.texts == tuple(e.instruction for e in sample_edits(SMALL, "test", 10**6, 6)[4:])


def test_a_killed_run_goes_on_bit_for_bit(parts, tmp_path):
    words = ["steps=5", "checkpoint_every=1", "eval_every=2", "num_layers=2", "flow=0.5"]
    whole, killed = (
        tiny("scenes-edit-delta", tmp_path / name, parts, *words) for name in ("whole", "killed")
    )
    train(whole, build(whole))
    given = [*TINY, *parts, *words, f"out_dir={killed.out_dir}"]
    command = ["scenes-edit-delta", *(part for word in given for part in ("--set", word))]
    run = Run(killed.out_dir, arguments=command)
    run.run_folder = killed.folder
    run.until_saved(2)
    run.kill()
    assert run.ranks[0].exitcode == -9
    train(killed, build(killed))
    assert_equal_runs(killed.folder, whole.folder)
    folders = [config.folder / "export/editor" for config in (whole, killed)]
    assert same_state(*map(EmbeddingEditor.from_pretrained, folders))


def test_a_run_does_not_go_on_behind_another_adapter(parts, tmp_path):
    config = tiny("scenes-edit-delta", tmp_path, parts, "decoder=none")
    train(config, build(config))
    other = write_parts(tmp_path / "other")
    adapter = build(config).behind.adapter
    with torch.no_grad():
        adapter.proj_out.bias.add_(1)
    adapter.save_pretrained(tmp_path / "other/adapter")
    moved = override(config, ["steps=3", *other[:1], *other[2:]])
    train(moved, build(moved))
    another = override(config, ["steps=4", *other])
    with pytest.raises(ValueError, match="another config: editor"):
        train(another, build(another))


def test_an_exported_editor_carries_its_card(parts, tmp_path):
    config = tiny("scenes-edit-delta", tmp_path, parts)
    train(config, build(config))
    target = export_run(config.folder, tmp_path / "editor")
    card = (target / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert 'pipe.edit("a.png", "remove the red circle")' in card
    assert "28 positions of\n16 channels" in card
    assert "| mode | delta |" in card
    assert "| written |" in card
    assert str(tmp_path) not in card
    found, made = (
        EmbeddingEditor.from_pretrained(folder)
        for folder in (target, config.folder / "export/editor")
    )
    assert same_state(found, made)
    assert found.config["adapter"][:12] in card


def test_an_editor_is_put_into_what_ships_and_all_else_stays(parts, tmp_path, monkeypatch):
    config = tiny("scenes-edit-delta", tmp_path / "runs", parts, "decoder=none", "eval_every=1000")
    train(config, build(config))
    target = tmp_path / "shipped"
    folders = dict(part.split("=") for part in parts if not part.startswith("instructions"))
    SemanticPipeline.from_pretrained(**folders).save_pretrained(target)
    before = tree_of(target)
    with monkeypatch.context() as patched:
        patched.setattr("train.scenes_export.EDITOR_BYTES", 1000)
        with pytest.raises(ValueError, match="the editor must be at most 1000 bytes, got"):
            export_editor(config.folder, target)
    assert tree_of(target) == before
    written = export_editor(config.folder, target)
    after = tree_of(target)
    new = {name for name in after if name.startswith(("editor/", "instructions/"))}
    assert after.keys() - before.keys() == new
    assert {name for name in before if before[name] != after[name]} == {"SHA256SUMS"}
    assert written == sum((target / name).stat().st_size for name in new)
    pipe = SemanticPipeline.from_pretrained(target)
    pictures = render([edit.source for edit in sample_edits(SMALL, "test", 0, 2)], SMALL.size)
    result = pipe.edit(pictures, ["remove the red circle", "delete the blue one"])
    assert torch.equal(result.change > 0, result.edited)
    # once more, in the place of the first; and not behind another adapter
    assert export_editor(config.folder, target) == written
    pipe.adapter.proj_out.bias.data.add_(1)
    pipe.editor = None
    pipe.save_pretrained(target)
    other = tree_of(target)
    with pytest.raises(ValueError, match="editor must have learned the embeddings of this adapter"):
        export_editor(config.folder, target)
    with pytest.raises(FileNotFoundError, match="editor must be the folder of a trained model"):
        export_editor(tmp_path / "nothing", target)
    assert tree_of(target) == other


def test_an_editor_learns_in_half_precision_too(parts, tmp_path):
    words = ["precision=bf16", "flow=0.5", "steps=1", "eval_every=1", "batch_size=2"]
    config = tiny("scenes-edit-autoregressive", tmp_path, parts, *words)
    train(config, build(config))
    found = read_log(config.folder)[1]
    assert found["loss"] == pytest.approx(found["edit"] + 0.5 * found["flow"], rel=1e-2)
    assert found["eval/written"] > 0


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("mode=both", "mode must be .*got 'both'"),
        ("num_heads=5", "width must be a multiple of num_heads, got 128 and 5"),
        ("ff_width=0", "ff_width must be at least 1, got 0"),
        ("flow=-1", "flow must be at least 0 and finite, got -1.0"),
        ("lora_rank=0", "lora_rank must be at least 1, got 0"),
        ("eval_pictures=0", "eval_pictures must be at least 1, got 0"),
    ],
)
def test_a_number_that_cannot_be(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES["scenes-edit-delta"](), [assignment])


def test_a_flow_without_a_decoder_is_refused():
    with pytest.raises(ValueError, match=r"decoder must be fast or stock where flow is 0.5, got n"):
        override(RECIPES["scenes-edit-delta"](), ["decoder=none", "flow=0.5"])


def test_what_is_missing_or_of_no_use_is_refused_and_nothing_is_written(parts, tmp_path):
    out = tmp_path / "out"
    given = [part for word in (*parts, f"out_dir={out}") for part in ("--set", word)]
    for command, code, message in (
        (
            ["scenes-edit-delta", *given, "--set", "adapter=none"],
            1,
            "adapter must be the folder of",
        ),
        (["scenes-edit-delta", *given, "--set", "instructions=none"], 1, "instructions must be th"),
        (["scenes-edit-delta", *given, "--from", "x"], 1, "--from is for recipes of an adapter"),
        (["plan", "scenes-edit-delta"], 2, "plan is of recipes of an adapter, got scenes-edit-del"),
        (["edit-t5-large", "--set", f"out_dir={out}"], 1, "the adapter must be given as a folder"),
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == code, result.output
        assert message in result.output.replace("\n", " ")
        assert not out.exists()


def test_what_reads_instructions_learns_to_fill_in_words(tmp_path):
    words = ["steps=2", "batch_size=8", "warmup_steps=1", "log_every=1", f"out_dir={tmp_path}"]
    config = override(RECIPES["scenes-instructions"](), words)
    stage = build(config)
    batch = stage.batches_of(1, [range(8)])[0]
    drawn = sample_edits(SMALL, "train", 1, 8)
    assert batch.texts[::2] == tuple(edit.instruction for edit in drawn[::2])
    assert all("background" in text for text in batch.texts[1::2])
    asked = []
    stage.encoder.register_forward_pre_hook(
        lambda module, args, given: asked.append((args[0], given["attention_mask"])),
        with_kwargs=True,
    )
    stage.losses(batch)
    ids, said = asked[0]
    hidden = ids == stage.tokenizer.get_vocab()[MASK]
    assert hidden.any(1).sum() > 4
    assert not hidden[said == 0].any()
    # the end of a text is told, never asked
    assert ((ids == stage.tokenizer.eos_token_id).sum(1) == 1).all()
    whole = stage.losses(batch)["loss"]
    halves = [stage.losses(b)["loss"] for b in stage.batches_of(1, [range(4), range(4, 8)])]
    torch.testing.assert_close(whole, sum(halves) / 2)
    train(config, stage)
    reader = InstructionEncoder.from_pretrained(config.folder / "export/instructions")
    averaged = read_state(newest(config), "ema/text.")
    assert all(torch.equal(t, averaged[name]) for name, t in reader.model.state_dict().items())
    known = reader.tokenizer(" ".join(edits.WORDS)).input_ids
    assert reader.tokenizer.unk_token_id not in known


def test_all_sizes_of_the_recipes_are_those_of_a_t5():
    for name in ("t5-large", "t5-xxl"):
        config = RECIPES[f"edit-{name}"]()
        sizes = {key: getattr(config, key) for key in ("width", "num_layers", "num_heads")}
        sizes |= {"ff_width": config.ff_width, "head_dim": config.width // config.num_heads}
        assert sizes == PRESETS[name]
    assert {RECIPES[f"scenes-edit-{mode}"]().mode for mode in MODES} == set(MODES)
    assert RECIPES["edit-llm"]().llm is not None
