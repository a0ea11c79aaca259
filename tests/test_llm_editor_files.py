import json
import os
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config

from sda_fast.editors.llm import LLMEditor
from sda_fast.editors.llm_base import base_fingerprint
from sda_fast.editors.llm_config import OWN_FILE
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from sda_fast.weights import read_safetensors, write_safetensors
from tests.tiny_encoders import same_state
from tests.tiny_llm import CHANNELS, OPTIONS, TREE, tiny_llm_editor, write_base

LORA = "lora/adapter_model.safetensors"
FILES = ["config.json", OWN_FILE, "lora/adapter_config.json", LORA]
LONG = "move the big red circle to a place"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "qwen2")


def listing(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_round_trip(base, tmp_path):
    editor = tiny_llm_editor(base, shaken=True, adapter="ab-12")
    editor.save_pretrained(tmp_path / "a")
    files = listing(tmp_path / "a")
    assert sorted(files) == FILES
    assert not any(str(tmp_path.parent).encode() in data for data in files.values())
    loaded = LLMEditor.from_pretrained(tmp_path / "a", base=base)
    assert same_state(loaded, editor)
    assert not loaded.training
    assert loaded.config["adapter"] == "ab-12"
    assert loaded.config["base"] == "qwen2"
    emb = SemanticEmbedding(torch.randn(2, 6, CHANNELS), Hierarchy(TREE))
    results = [e.edit(emb, LONG).embedding.tokens for e in (editor, loaded)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], emb.tokens)
    targets = json.loads(files["lora/adapter_config.json"])["target_modules"]
    assert targets == sorted(targets)
    loaded.save_pretrained(tmp_path / "b")
    assert listing(tmp_path / "b") == files


def test_the_base_goes_by_its_weights_and_its_name_by_default(base, tmp_path, monkeypatch):
    editor = tiny_llm_editor(base, shaken=True)
    editor.save_pretrained(tmp_path / "e")
    shards = write_base(tmp_path / "shards", max_shard_size="20KB")
    loaded = LLMEditor.from_pretrained(tmp_path / "e", base=shards)
    assert same_state(loaded, editor)
    assert loaded.config["base"] == "qwen2"
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    with pytest.raises(FileNotFoundError, match="base must be a folder, got qwen2"):
        LLMEditor.from_pretrained(tmp_path / "e")
    monkeypatch.chdir(base.parent)
    assert same_state(LLMEditor.from_pretrained(tmp_path / "e"), editor)


def test_peft_reads_the_lora(base, tmp_path):
    editor = tiny_llm_editor(base, shaken=True)
    editor.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids, _ = editor.encode_text([LONG])
    before = plain(ids).logits
    with torch.no_grad():
        read = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()(ids).logits
        assert torch.equal(read, editor.llm(ids).logits)
    assert (read - before).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["write_whole", "write_safetensors", "write_lora"])
def test_a_failed_save_leaves_the_old_one_whole(base, tmp_path, monkeypatch, part):
    tiny_llm_editor(base).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    before, called = listing(tmp_path), []

    def fail(*_):
        called.append(part)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"sda_fast.editors.llm.{part}", fail)
    with pytest.raises(OSError, match="No space left"):
        tiny_llm_editor(base, shaken=True).save_pretrained(tmp_path)
    assert called == [part]
    assert listing(tmp_path) == before
    monkeypatch.undo()
    editor = tiny_llm_editor(base, shaken=True)
    editor.save_pretrained(tmp_path)
    assert sorted(listing(tmp_path)) == ["README.md", *FILES]
    assert same_state(LLMEditor.from_pretrained(tmp_path, base=base), editor)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", OWN_FILE])
def test_a_save_cut_off_while_moving_is_never_a_mix(base, tmp_path, monkeypatch, name):
    tiny_llm_editor(base).save_pretrained(tmp_path)
    replace, moved = os.replace, []

    def stop(source, target):
        goal = tmp_path / name if name == OWN_FILE else tmp_path / "lora" / name
        if target == goal:
            moved.append(name)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny_llm_editor(base, shaken=True).save_pretrained(tmp_path)
    assert moved == [name]
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        LLMEditor.from_pretrained(tmp_path, base=base)


def damage_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def resize(file, name):
    tensors = read_safetensors(file)
    tensors[name] = tensors[name][:-1]
    write_safetensors(file, tensors)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
DAMAGES = {
    "other model": (lambda f: damage_json(f / "config.json", _class_name="X"), "config of 'X'"),
    "no argument": (lambda f: (f / "config.json").write_text('{"_class_name": "LLMEditor"}'),
                    "tokens_per_node"),
    "bad argument": (lambda f: damage_json(f / "config.json", lora_rank=0), "lora_rank must be"),
    "bad base": (lambda f: damage_json(f / "config.json", base=None), "base must be a text"),
    "torn": (lambda f: os.truncate(f / OWN_FILE, 900), "truncated"),
    "torn lora": (lambda f: os.truncate(f / LORA, 900), "truncated"),
    "foreign": (lambda f: shutil.copy(f / LORA, f / OWN_FILE), "do not fit"),
    "foreign lora": (lambda f: shutil.copy(f / OWN_FILE, f / LORA), "do not fit"),
    "size": (lambda f: resize(f / OWN_FILE, "positions"), r"positions \(5, 32\) for \(6, 32\)"),
    "size of lora": (lambda f: resize(f / LORA, FIRST), r"down_proj.* \(3, 48\) for \(4, 48\)"),
    "alpha": (lambda f: damage_json(f / "lora/adapter_config.json", lora_alpha=3), "must say"),
    "torn config": (lambda f: (f / "lora/adapter_config.json").write_text("{"), "torn"),
    "pickle": (lambda f: (f / LORA).rename(f / "lora/adapter_model.bin"), "pickled"),
    "pickled own": (lambda f: (f / OWN_FILE).rename(f / "editor.pt"), "pickled"),
    "other base": (lambda f: damage_json(f / "config.json", base_fingerprint="00"),
                   "model that the editor was trained on"),
}  # fmt: skip


def test_damaged_folders_are_refused(base, tmp_path):
    tiny_llm_editor(base).save_pretrained(tmp_path / "whole")
    for number, (damage, words) in enumerate(DAMAGES.values()):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        damage(folder)
        with pytest.raises(ValueError, match=words):
            LLMEditor.from_pretrained(folder, base=base)
    for missing in ("config.json", OWN_FILE, "lora/adapter_config.json", LORA):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / missing.replace("/", "-"))
        (folder / missing).unlink()
        with pytest.raises(FileNotFoundError, match="without"):
            LLMEditor.from_pretrained(folder, base=base)


@pytest.mark.parametrize("damage", ["torn", "torn lora", "pickle", "pickled own", "alpha"])
def test_files_are_looked_at_before_the_base(base, tmp_path, damage):
    tiny_llm_editor(base).save_pretrained(tmp_path)
    DAMAGES[damage][0](tmp_path)
    with pytest.raises(ValueError, match=DAMAGES[damage][1]):
        LLMEditor.from_pretrained(tmp_path, base=tmp_path / "not there")


def test_weights_of_another_name_are_no_editors(base, tmp_path):
    tiny_llm_editor(base).save_pretrained(tmp_path)
    (tmp_path / OWN_FILE).rename(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=OWN_FILE):
        LLMEditor.from_pretrained(tmp_path, base=tmp_path / "not there")


def test_another_base_is_refused_before_it_is_loaded(base, tmp_path, monkeypatch):
    tiny_llm_editor(base).save_pretrained(tmp_path / "e")
    sister = write_base(tmp_path / "sister", seed=1)  # of the same names and sizes
    assert base_fingerprint(sister) != base_fingerprint(base)
    monkeypatch.setattr("sda_fast.editors.llm_base._read_model", None)
    for other in (sister, write_base(tmp_path / "llama", "llama")):
        with pytest.raises(ValueError, match=f"got {base_fingerprint(other)}"):
            LLMEditor.from_pretrained(tmp_path / "e", base=other)


def spoil_base(base, folder, name):
    shutil.copytree(base, folder)
    {
        "gpt2": lambda: GPT2Config().save_pretrained(folder),
        "tokenizer": lambda: (folder / "tokenizer.json").unlink(),
        "torn tokenizer": lambda: (folder / "tokenizer.json").write_text("{}"),
        "torn": lambda: os.truncate(folder / "model.safetensors", 3000),
        "pickle": lambda: (folder / "model.safetensors").rename(folder / "model.bin"),
        "adapter": lambda: (folder / "adapter_config.json").write_text("{}"),
        "layers": lambda: damage_json(folder / "config.json", num_hidden_layers=3,
                                      layer_types=None),
        "vocabulary": lambda: extend_tokenizer(folder / "tokenizer.json"),
    }[name]()  # fmt: skip
    return folder


def extend_tokenizer(file):
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["one more"] = len(tokenizer["model"]["vocab"]) + 40
    for number in range(60):
        tokenizer["model"]["vocab"][f"w{number}"] = 1000 + number
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("gpt2", ValueError, "base must be one of .* got a model of 'gpt2'"),
        ("tokenizer", FileNotFoundError, "base must come with its tokenizer"),
        ("torn tokenizer", ValueError, "torn or no tokenizer"),
        ("torn", ValueError, "truncated"),
        ("pickle", ValueError, "pickled weights"),
        ("adapter", ValueError, "without an adapter"),
        ("layers", ValueError, "do not fit its config"),
        ("vocabulary", ValueError, "at most the model's"),
    ],
)
def test_bases_that_cannot_be_are_refused(base, tmp_path, name, error, words):
    with pytest.raises(error, match=words):
        LLMEditor.from_base(spoil_base(base, tmp_path / "b", name), TREE, CHANNELS, **OPTIONS)


def test_says_what_to_install(base, tmp_path, monkeypatch):
    tiny_llm_editor(base).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install \"sda-fast\[train\]\""):
        LLMEditor.from_base(base, TREE, CHANNELS)
    with pytest.raises(ImportError, match="needs peft"):
        LLMEditor.from_pretrained(tmp_path, base=base)
