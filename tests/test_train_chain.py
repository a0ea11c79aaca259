"""A phase goes on from another: the hierarchy grows, and what was there stays."""

import json
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sda_fast.files import write_manifest
from sda_fast.hierarchy import Hierarchy
from sda_fast.weights import digest
from tests.tiny_scenes import tiny_scenes_pipeline
from train.__main__ import build_stage
from train.checkpoint import newest_valid, read_meta, read_state
from train.config import override
from train.lineage import begin, find_parent
from train.loop import train
from train.ranks import Ranks
from train.recipes import RECIPES
from train.report import read_log
from train.state import State

TINY = [
    "steps=2", "batch_size=2", "warmup_steps=1", "log_every=1", "eval_every=2", "eval_pictures=2",
    "precision=fp32", "width=32", "num_layers=2", "num_heads=2", "level_dropout=0",
]  # fmt: skip
CHAIN = ("scenes-16", "scenes-32", "scenes-64", "scenes-128")
QUERIES = "adapter.qformer.queries"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Frozen models of the scenes world, untrained."""
    folder = tmp_path_factory.mktemp("parts")
    pipe = tiny_scenes_pipeline()
    pipe.flux.save_pretrained(folder / "flux")
    pipe.adapter.encoder.clip.save_pretrained(folder / "clip")
    pipe.adapter.encoder.dino.save_pretrained(folder / "dino")
    return [f"{name}={folder / name}" for name in ("flux", "clip", "dino")]


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def tiny(recipe, out_dir, parts, *more):
    words = [*TINY, "muon_lr=0", *parts, f"out_dir={out_dir}", *more]
    return override(RECIPES[recipe](), words)


@pytest.fixture(scope="module")
def chain(parts, out_dir):
    """All links, one after the other; the decoder's hash before and after."""
    hashes, parent = set(), None
    for recipe in CHAIN:
        config = tiny(recipe, out_dir, parts)
        stage = build_stage(config, Ranks())
        hashes.add(digest(stage.frozen.flux.transformer))
        train(config, stage, parent=find_parent(config, parent))
        hashes.add(digest(stage.frozen.flux.transformer))
        parent = str(config.folder)
    assert len(hashes) == 1
    return out_dir


def checkpoint(out_dir, recipe):
    return newest_valid(out_dir / recipe / "checkpoints", pytest.fail)


def test_the_chain_runs_from_16_to_128(chain):
    trees = [read_meta(checkpoint(chain, name))["adapter"]["tokens_per_node"] for name in CHAIN]
    assert [Hierarchy(tuple(tree)).num_tokens for tree in trees] == [16, 32, 64, 128]
    for name in CHAIN:
        assert list(read_log(chain / name)) == [1, 2]
        config = json.loads((chain / name / "export/adapter/config.json").read_text())
        assert config["tokens_per_node"] == trees[CHAIN.index(name)]


@pytest.mark.parametrize(("old", "new"), [*pairwise(CHAIN), ("scenes-16", "scenes-128")])
def test_positions_that_were_there_stay_bit_for_bit(old, new, chain, parts, tmp_path):
    path = checkpoint(chain, old)
    config = tiny(new, tmp_path, parts)
    state = State(config, build_stage(config, Ranks()), Ranks())
    begin(state, find_parent(config, str(path)), seed=0)
    before = Hierarchy(tuple(read_meta(path)["adapter"]["tokens_per_node"]))
    after = Hierarchy(config.tokens_per_node)
    rows = torch.cat(
        [
            torch.arange(after.span(node.path).start, after.span(node.path).stop)[
                : node.stop - node.start
            ]
            for node in before.nodes()
        ]
    )
    grown = state.tensors()
    for kind in ("model/", "ema/", "optim/"):
        for name, had in read_state(path, kind).items():
            now = grown[kind + name]
            if name.startswith(QUERIES) and had.ndim:
                assert torch.equal(now[rows], had)
                rest = torch.ones(len(now), dtype=torch.bool)
                rest[rows] = False
                assert rest.sum() == after.num_tokens - before.num_tokens
                assert bool(now[rest].any()) == (kind != "optim/")
            else:
                assert torch.equal(now, had)


def test_the_average_of_a_parent_is_not_forgotten(chain, parts, tmp_path):
    path = checkpoint(chain, "scenes-16")
    had = read_state(path, "ema/adapter.proj_out.")["weight"]
    config = tiny("scenes-32", tmp_path, parts, "ema_decay=0.999", "adamw_lr=1e-2", "steps=3")
    train(config, build_stage(config, Ranks()), parent=find_parent(config, str(path)))
    newest = checkpoint(tmp_path, "scenes-32")
    model, ema = (
        read_state(newest, f"{kind}/adapter.proj_out.")["weight"] for kind in ("model", "ema")
    )
    assert read_meta(newest)["inherited"]
    assert 0 < (ema - had).norm() < 0.02 * (model - had).norm()


def test_a_parent_that_has_not_finished_is_remarked(chain, parts, tmp_path):
    from shutil import copytree

    copytree(chain / "scenes-16", tmp_path / "run")
    config = tiny("scenes-32", tmp_path, parts)
    meta = next((tmp_path / "run/checkpoints").glob("step-*/meta.json"))
    meta.write_text(meta.read_text().replace('"steps": 2', '"steps": 9'))
    write_manifest(meta.parent)
    with pytest.warns(UserWarning, match="is of step 2 of 9"):
        assert find_parent(config, str(tmp_path / "run")) == meta.parent


def test_torch_reads_a_checkpoint_too(chain):
    path = checkpoint(chain, "scenes-16")
    ours = read_state(path, "")
    theirs = {name: torch.empty_like(t) for name, t in ours.items()}
    dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(torch.equal(theirs[name], t) for name, t in ours.items())


def test_a_run_goes_on_where_its_models_have_moved_but_not_with_others(chain, parts, tmp_path):
    from shutil import copytree

    copytree(chain / "scenes-16", tmp_path / "runs/scenes-16")
    moved = tmp_path / "flux"
    copytree(parts[0].partition("=")[2], moved)
    config = tiny("scenes-16", tmp_path / "runs", parts, f"flux={moved}", "steps=3")
    train(config, build_stage(config, Ranks()))
    other = json.loads((moved / "transformer/config.json").read_text()) | {"note": "another"}
    (moved / "transformer/config.json").write_text(json.dumps(other))
    longer = override(config, ["steps=4"])
    with pytest.raises(ValueError, match="another config: frozen"):
        train(longer, build_stage(longer, Ranks()))


def test_a_phase_names_the_parent_that_it_wants(parts, tmp_path, chain):
    config = tiny("scenes-32", tmp_path, parts)
    with pytest.raises(
        FileNotFoundError, match=r"this recipe goes on from scenes-16: give --from RUN"
    ):
        find_parent(config, None)
    assert find_parent(config, "scratch") is None
    with pytest.raises(FileNotFoundError, match="nothing holds none that is whole"):
        find_parent(config, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"tokens_per_node must not be smaller .* \(32, 8, 4\)"):
        find_parent(config, str(chain / "scenes-128"))
    wider = override(config, ["width=64"])
    with pytest.raises(ValueError, match=r"another adapter: width \(was 32, now 64\)"):
        find_parent(wider, str(chain / "scenes-16"))


def test_a_parent_whose_checkpoint_is_torn_is_named(parts, tmp_path, chain):
    from shutil import copytree

    config = tiny("scenes-32", tmp_path, parts)
    run = tmp_path / "run"
    copytree(chain / "scenes-16", run)
    state = next((run / "checkpoints").glob("step-*/*.safetensors"))
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.write_bytes(data)
    with pytest.raises(FileNotFoundError, match=r"none that is whole; .*differs"):
        find_parent(config, str(run))
    with pytest.raises(ValueError, match="differs"):
        find_parent(config, str(state.parent))
