import io
from contextlib import redirect_stdout

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from bench.__main__ import main as bench
from bench.inversion import invert
from bench.quality import bootstrap
from bench.records import append_record, read_records
from bench.report import NEEDED, VARIANTS, latest_records, quality_tables, replace_section
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from sda_fast.scenes.models import build_tokenizer
from sda_fast.scenes.score import Sums, row, score
from sda_fast.scenes.world import SMALL, sample_scenes

from .tiny_scenes import PATCH, POOLED, SIZE, WIDTH, tiny_scenes_pipeline

TWICE = 2 * "<!-- generated:quality -->\n<!-- /generated:quality -->\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny pipeline that reads captions, and a flat adapter for it."""
    root = tmp_path_factory.mktemp("models")
    pipe = tiny_scenes_pipeline()
    tokenizer = build_tokenizer(SMALL)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    pipe.flux.register_modules(
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)),
        tokenizer_2=tokenizer,
    )
    pipe.save_pretrained(root / "model")
    tiny_scenes_pipeline(1, tokens_per_node=(28,)).adapter.save_pretrained(root / "flat")
    return root


def run(suite, options, *rest):
    """The command in this process: its exit code and what it printed."""
    arguments = [str(part) for option in options.items() for part in option]
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as stop:
        bench([suite, *arguments, *rest])
    return stop.value.code, " ".join(said.getvalue().split())


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    """What the command wrote, and what it printed."""
    out = tmp_path_factory.mktemp("results") / "new" / "quality.jsonl"
    models = {"--model": folders / "model", "--flat": folders / "flat", "--out": out}
    sizes = {"--scenes": 4, "--seeds": 2, "--steps": 2, "--inversions": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.quality.INVERSION_STEPS", 2)
        code, said = run("quality", models | sizes)
    assert code == 0
    return read_records(out), said


def finished(run, **means):
    """The records that a run must have, with these means in its reconstruction."""
    others = [record(variant, run=run) for variant in sorted(NEEDED - {"reconstruction"})]
    return [*others, record("reconstruction", run=run, **means)]


def record(variant, *, run="1", n=512, psnr=None, **means):
    metrics = {
        name: {"mean": mean, "low": mean - 0.01, "high": mean + 0.03}
        for name, mean in means.items()
    }
    if psnr is not None:
        metrics["psnr"] = {"mean": psnr, "low": psnr - 0.5, "high": psnr + 0.5}
    return {
        "variant": variant,
        "n": n,
        "seeds": 3,
        "steps": 20,
        "metrics": metrics,
        "decoder": "a1",
        "run": run,
        "versions": {"torch": "2.13.0"},
        "commit": "c0ffee",
    }


def test_quality_measures_every_variant(results):
    records, _ = results
    assert [r["variant"] for r in records] == list(VARIANTS)
    sizes = {r["variant"]: r["n"] for r in records}
    assert sizes == dict.fromkeys(VARIANTS, 4) | {
        "held_out_pairs": 2,
        "held_out_count": 2,
        "inversion": 2,
        "reconstruction_of_inverted": 2,
    }


def test_the_records_say_what_was_measured(results):
    by_variant = {r["variant"]: r for r in results[0]}
    assert len({r["decoder"] for r in results[0]}) == 1
    readers = [by_variant[v]["reader"] for v in ("caption", "reconstruction", "flat")]
    assert len(set(readers)) == 3
    assert by_variant["reconstruction"]["reader"] == by_variant["held_out_pairs"]["reader"]
    assert by_variant["inversion"]["reader"] is None
    for r in results[0]:
        assert torch.__version__.startswith(r["versions"]["torch"])
        assert r["commit"]
        for metric in r["metrics"].values():
            assert metric["low"] - 1e-6 <= metric["mean"] <= metric["high"] + 1e-6


def test_the_parser_reads_its_own_world_and_not_noise(results):
    """Four clean renders are read without a fault; what an untrained decoder draws is not."""
    by_variant = {r["variant"]: r["metrics"] for r in results[0]}
    clean = by_variant["parser_clean"]
    assert all(clean[name]["mean"] == 1 for name in ("precision", "recall", "count", "color"))
    assert "psnr" not in clean
    assert 25 < by_variant["parser_noise"]["psnr"]["mean"] < 27  # -20 log10(0.05)
    assert by_variant["reconstruction"]["psnr"]["mean"] < 15


def test_the_command_prints_the_ceiling_with_the_table(results):
    assert "parser ceiling, clean render" in results[1]


def test_records_are_appended_and_the_latest_finished_run_counts(tmp_path):
    path = tmp_path / "quality.jsonl"
    for run, miou in (("1", 0.5), ("2", 0.7)):
        for found in finished(run, miou=miou):
            append_record(path, found)
    append_record(path, record("reconstruction", run="3", n=8, miou=0.9))  # cut off, or a try
    latest = latest_records(read_records(path))
    assert latest["reconstruction"]["metrics"]["miou"]["mean"] == 0.7
    assert {r["run"] for r in latest.values()} == {"2"}


def test_without_a_finished_run_there_is_no_table():
    with pytest.raises(ValueError, match="no run measured all of caption, parser_clean"):
        latest_records([record("caption"), record("reconstruction")])


def test_a_record_with_a_nan_is_not_written(tmp_path):
    path = tmp_path / "quality.jsonl"
    append_record(path, record("caption"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        append_record(path, record("caption", miou=float("nan")))
    assert path.read_bytes() == before


def test_tables_show_what_was_measured_and_what_became_of_the_aims():
    tables = quality_tables(
        [
            *finished("1", miou=0.625, color=0.94, shape=0.85, psnr=21.25),
            record("flat", n=256, miou=0.5),
        ]
    )
    lines = tables.splitlines()
    (rebuilt,) = [line for line in lines if line.startswith("| **reconstruction")]
    cells = [cell.strip() for cell in rebuilt.strip("|").split("|")]
    assert cells[1:] == [
        "512", "–", "–", "–", "0.940 ±0.020", "0.850 ±0.020", "–", "–", "0.625 ±0.020", "21.2 ±0.5",
    ]  # fmt: skip
    assert lines.index(rebuilt) < next(i for i, x in enumerate(lines) if x.startswith("| flat"))
    squeezed = {" ".join(line.split()) for line in lines}
    for verdict in (
        "| layout mIoU | ≥ 0.60 | 0.625 | met |",
        "| colour of matched objects | ≥ 0.95 | 0.940 | missed |",
        "| shape of matched objects | ≥ 0.85 | 0.850 | met |",
        "| layout mIoU above the flat QFormer | ≥ 0.10 | 0.125 | met |",
    ):
        assert verdict in squeezed
    assert "3 noise seeds of 20 steps" in tables
    assert all(word in tables for word in ("a1", "torch 2.13.0", "c0ffee"))


def test_an_aim_without_its_record_is_not_called_met():
    tables = quality_tables(finished("1", miou=0.9))
    (line,) = [line for line in tables.splitlines() if "above the flat QFormer" in line]
    assert [cell.strip() for cell in line.split("|")[3:5]] == ["–", "not measured"]
    with pytest.raises(ValueError, match="at least one record"):
        quality_tables([])


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- generated:quality -->\nold\n<!-- /generated:quality -->\nafter\n")
    for found in finished("1", miou=0.9):
        append_record(tmp_path / "quality.jsonl", found)
    return path


def report(readme, *rest):
    return run("report", {"--readme": readme, "--results": readme.parent}, *rest)


def test_report_replaces_the_section_and_nothing_else(readme):
    code, said = report(readme, "--check")
    assert code == 1
    assert "stale" in said
    assert "old" in readme.read_text()
    assert report(readme)[0] == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- generated:quality -->\n|")
    assert text.endswith(".\n<!-- /generated:quality -->\nafter\n")
    assert "0.900" in text
    assert report(readme, "--check")[0] == 0
    assert report(readme)[0] == 0
    assert readme.read_text() == text
    assert sorted(p.name for p in readme.parent.iterdir()) == ["README.md", "quality.jsonl"]


@pytest.mark.parametrize(
    "torn", ["nothing", "<!-- /generated:quality --><!-- generated:quality -->", TWICE]
)
def test_report_refuses_a_readme_without_its_markers(readme, torn):
    readme.write_text(torn)
    code, said = report(readme)
    assert code == 2
    assert "<!-- generated:quality -->" in said
    assert readme.read_text() == torn
    with pytest.raises(ValueError, match="each once"):
        replace_section(torn, "quality", "new")


def test_report_refuses_missing_and_torn_results(readme):
    before, results = readme.read_text(), readme.parent / "quality.jsonl"
    for line, fault in (('{"variant": "fl', "is not JSON"), ("[1]", "must be a JSON object")):
        good = results.read_text()
        results.write_text(f"{good}{line}\n")
        code, said = report(readme)
        assert code == 2
        assert f"quality.jsonl:5 {fault}" in said
        results.write_text(good)
    results.unlink()
    code, said = report(readme)
    assert code == 2
    assert "python -m bench quality" in said
    assert readme.read_text() == before


def test_bootstrap_gives_the_rates_and_narrows_with_more_scenes():
    scenes = sample_scenes(SMALL, "test", 3, 60)
    # every third scene is read as its neighbour
    parsed = [scenes[i - 1] if i % 3 == 0 else scene for i, scene in enumerate(scenes)]
    each = [score([p], [t]) for p, t in zip(parsed, scenes, strict=True)]
    fields = list(Sums.__dataclass_fields__)
    sums = torch.tensor([[getattr(s, f) for f in fields] for s in each], dtype=torch.float64)
    fidelity = torch.arange(60, dtype=torch.float64)
    few, many = (bootstrap(sums.repeat(k, 1), fidelity.repeat(k)) for k in (1, 16))
    for name, rate in row(score(parsed, scenes)).items():
        assert few[name]["mean"] == pytest.approx(rate, abs=1e-5)
        assert few[name]["low"] < rate < few[name]["high"]
        ratio = (few[name]["high"] - few[name]["low"]) / (many[name]["high"] - many[name]["low"])
        assert 3 < ratio < 5.3  # 4 for sixteen times as many
    assert few["psnr"]["mean"] == 29.5
    # 1.96 * sd / sqrt(n) of the numbers 0 to 59
    assert few["psnr"]["high"] - few["psnr"]["mean"] == pytest.approx(4.38, rel=0.1)


def test_inversion_fits_each_picture_and_leaves_the_decoder_alone():
    pipe = tiny_scenes_pipeline()
    transformer = pipe.flux.transformer
    before = {name: t.clone() for name, t in transformer.state_dict().items()}
    tree = Hierarchy((4, 2, 1))
    start = SemanticEmbedding(torch.randn(2, 28, WIDTH), tree, torch.zeros(2, POOLED))
    pictures, ticks = torch.rand(2, 3, SIZE, SIZE), []
    found = invert(pipe, pictures, start, steps=3, on_step=lambda: ticks.append(1))
    assert len(ticks) == 3
    assert found.tree == tree
    moved = (found.tokens - start.tokens).abs().amax(-1)
    assert (moved > 0).all()  # no position of any picture is left out
    assert all(torch.equal(t, before[name]) for name, t in transformer.state_dict().items())
    assert all(p.grad is None for p in transformer.parameters())
    with pytest.raises(ValueError, match=r"pictures must be \[2, 3, H, W\]"):
        invert(pipe, pictures[:1], start)


def test_inversion_descends_the_velocity_error():
    """A picture's own positions predict its velocity better than where they started."""
    pipe = tiny_scenes_pipeline()
    # a decoder that listens: the txt stream of an untrained one hardly reaches its output
    with torch.no_grad():
        for name, weight in pipe.flux.transformer.named_parameters():
            if "attn" in name and weight.ndim == 2:
                weight.mul_(4)
    start = SemanticEmbedding(
        torch.randn(1, 28, WIDTH), Hierarchy((4, 2, 1)), torch.zeros(1, POOLED)
    )
    picture = torch.ones(1, 3, SIZE, SIZE)
    found = invert(pipe, picture, start, steps=50)
    errors = [velocity_error(pipe, emb, picture) for emb in (start, found)]
    assert errors[1] < 0.97 * errors[0]


@torch.no_grad()
def velocity_error(pipe, emb, picture):
    flux, generator = pipe.flux, torch.Generator().manual_seed(9)
    latents = (flux.vae.encode(picture * 2 - 1).latent_dist.mode() + 0.4) * 2
    x0 = flux._pack_latents(latents, *latents.shape)
    inputs = emb.flux_inputs(SIZE, SIZE, patch=PATCH)
    errors = []
    for t in (0.2, 0.5, 0.8):
        noise = torch.randn(x0.shape, generator=generator)
        velocity = flux.transformer(
            hidden_states=(1 - t) * x0 + t * noise,
            encoder_hidden_states=inputs["prompt_embeds"],
            pooled_projections=inputs["pooled_prompt_embeds"],
            timestep=torch.tensor([t]),
            img_ids=flux._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32),
            txt_ids=torch.zeros(28, 3),
            joint_attention_kwargs=inputs["joint_attention_kwargs"],
        ).sample
        errors.append((velocity - (noise - x0)).square().mean().item())
    return sum(errors)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "usage: python -m bench SUITE"),
        (["qualty"], 2, "usage: python -m bench SUITE"),
        (["--help"], 0, "report"),
        (["quality", "--model", "nowhere/at/all"], 2, "nowhere/at/all"),
    ],
)
def test_the_command_explains_itself(arguments, code, says, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(arguments)
    assert stop.value.code == code
    assert says in capsys.readouterr().out


def test_a_flat_adapter_of_another_size_is_refused(folders, tmp_path):
    out = tmp_path / "quality.jsonl"
    tiny_scenes_pipeline(tokens_per_node=(27,)).adapter.save_pretrained(tmp_path / "flat")
    options = {"--model": folders / "model", "--flat": tmp_path / "flat", "--out": out}
    code, said = run("quality", options)
    assert code == 2
    assert "(28,)" in said
    assert "(27,)" in said
    assert not out.exists()


def test_a_model_that_reads_no_captions_is_refused(tmp_path):
    tiny_scenes_pipeline().save_pretrained(tmp_path / "model")
    code, said = run("quality", {"--model": tmp_path / "model", "--out": tmp_path / "out.jsonl"})
    assert code == 2
    assert "text encoder" in said
