"""The card of an exported adapter or editor: what it is, what was measured, on whose terms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sda_fast.adapter_config import PRESETS
from sda_fast.hierarchy import Hierarchy

FLUX = "black-forest-labs/FLUX.1-dev"
FLUX_LICENCE = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
TAGS = ["semantic-diffusion-adapter", "flux", "image-to-image"]
SHOWN = (
    "tokens_per_node", "rule", "rope", "width", "num_layers", "num_heads", "batch_size",
    "resolution", "guidance", "penalty", "level_dropout", "adamw_lr", "muon_lr", "encoder_lr",
    "open_layers", "weight_decay", "warmup_steps", "max_grad_norm", "ema_decay", "precision",
    "flux_precision", "parent", "seed", "mode", "text_features", "ff_width", "flow", "llm",
    "lora_rank",
)  # fmt: skip
"""Fields of a recipe that say what was trained; none holds a path."""

LICENCES = f"""| what it was trained with | licence |
|---|---|
| FLUX.1-dev, frozen: the decoder | [FLUX.1 \\[dev\\] Non-Commercial License]({FLUX_LICENCE}) |
| DFN CLIP, if that is the encoder | Apple's model licence for research, apple-amlr |
| InternViT, if that is the encoder | MIT |
| DINOv2 | Apache-2.0 |
| sda-fast, the code | Apache-2.0 |

The weights here were learned through FLUX.1-dev and from the features of these encoders, and do
nothing without them: take all of these terms to hold for them. That means no commercial use, and
with DFN CLIP research alone. None of those models' weights are in this folder{{opened}}."""

OPENED = """, but for DINOv2's last layers, which learned with the adapter and are in
`encoder_layers.safetensors`"""

USAGE = """```python
import sda_fast as sda
parts = {{"flux": "{flux}", "clip": "{clip}", "dino": "{dino}"}}
encoder = {{"size": {size}, "squash": {squash}}}
pipe = sda.SemanticPipeline.from_pretrained(adapter="path/to/this", encoder=encoder, **parts)
emb = pipe.encode("a.png")  # [1, {positions}, {channels}]
pipe.decode(emb, height={side}, width={side}, seed=0)[0].save("again.png")
```

Weights are read from safetensors alone: DFN CLIP's `.bin` is to be converted first."""

SCENES_USAGE = """```python
import sda_fast as sda
from sda_fast.encoders import HALF, ImageEncoder
adapter = sda.SemanticAdapter.from_pretrained("path/to/this")
means = dict.fromkeys(("clip_mean", "clip_std", "dino_mean", "dino_std"), HALF)
adapter.set_encoder(ImageEncoder.from_pretrained("clip", "dino", size={size}, **means))
emb = adapter.encode("a.png")  # [1, {positions}, {channels}]
```

Encoders and decoder are what the recipes scenes-clip, scenes-dino and scenes-text exported."""

EDITOR_USAGE = """```python
import sda_fast as sda
pipe = sda.SemanticPipeline.from_pretrained({parts}, editor="path/to/this")
result = pipe.edit("a.png", "{said}")
pipe.decode(result.embedding, seed=0)[0].save("edited.png")
```"""

LLM_USAGE = """```python
import sda_fast as sda
from sda_fast.editors.llm import LLMEditor
pipe = sda.SemanticPipeline.from_pretrained({parts})
pipe.editor = LLMEditor.from_pretrained("path/to/this", base="{base}")
result = pipe.edit("a.png", "{said}")
pipe.decode(result.embedding, seed=0)[0].save("edited.png")
```"""

EDITOR_LIMITS = """\
- It edits embeddings of the adapter that it learned behind, fingerprint {adapter}, and no other.
- It does what the pairs that it learned from did; instructions of another kind may do anything.
- What the adapter does not rebuild, an edit does not keep."""

REHEARSED = (
    """**A rehearsal: it learned through random models and is of no use with the real ones.**"""
)

LIMITS = """\
- It works with the decoder and the encoders that it was trained with, and with no other.
- It was trained at the resolution above; FLUX behaves badly below 512 pixels.
- It rebuilds a scene, not its pixels: small text, faces and counts of many things may change.
- It knows of the world what FLUX, CLIP and DINOv2 know, wrong and one-sided as that may be."""

SCENES_LIMITS = """\
- It knows the scenes world and nothing else: simple shapes, drawn {size} pixels wide.
- It works with the decoder and the encoders that it was trained with, and with no other."""

SCENES_LICENCE = """\
Apache-2.0, as the code. Decoder and encoders learned from drawn scenes alone: there are no foreign
weights behind it."""


def model_card(
    meta: Mapping[str, Any], evaluated: tuple[int, Mapping[str, float]] | None, opened: bool
) -> str:
    """The card as Markdown, with metadata in front.

    Args:
        meta: of the checkpoint: "recipe", "stage", "step", "adapter" and "config".
        evaluated: step and numbers of its evaluation.
        opened: layers of DINOv2 are in the folder.
    """
    scenes = meta["stage"] != "flux"
    parts = [
        f"---\n{_metadata(meta).to_yaml()}\n---",
        f"# {_plain(meta['recipe'])}",
        _about(meta, scenes),
        "## Use",
        _usage(meta, scenes),
        "## Training",
        _training(meta),
        "## Evaluation",
        _evaluation(evaluated),
        "## Limits",
        SCENES_LIMITS.format(size=_world_size(meta)) if scenes else LIMITS,
        "## Licences",
        _licences(scenes, opened),
    ]
    return "\n\n".join(parts) + "\n"


def editor_card(meta: Mapping[str, Any], evaluated: tuple[int, Mapping[str, float]] | None) -> str:
    """The card of an editor, likewise.

    Args:
        meta: of the checkpoint: "recipe", "stage", "step", "editor" and "config".
        evaluated: step and numbers of its evaluation.
    """
    scenes, editor, llm = meta["stage"] == "edit", meta["editor"], meta["config"]["llm"]
    tree = Hierarchy(tuple(editor["tokens_per_node"]))
    kind = "A causal language model with LoRA" if llm else "The decoder half of a T5"
    parts = [
        f"---\n{_metadata(meta).to_yaml()}\n---",
        f"# {_plain(meta['recipe'])}",
        f"{kind} that edits pictures in their embedding: {tree.num_tokens} positions of\n"
        f"{editor['channels']} channels and an instruction in, as many positions out. "
        f"For sda-fast {_version()}.",
        "## Use",
        _editor_usage(meta, scenes),
        "## Training",
        _training(meta),
        "## Evaluation",
        _evaluation(evaluated),
        "## Limits",
        EDITOR_LIMITS.format(adapter=str(editor["adapter"])[:12]),
        "## Licences",
        _licences(scenes, opened=False),
    ]
    if llm:
        base = _hub_id(llm) or editor["base"]
        parts.append(
            f"The language model, {_plain(base)}, is not in this folder; its terms hold too."
        )
    return "\n\n".join(parts) + "\n"


def _editor_usage(meta: Mapping[str, Any], scenes: bool) -> str:
    said = "remove the red circle" if scenes else "take the cup away"
    parts = '"scenes"' if scenes else "flux=..., adapter=..., clip=..., dino=..."
    llm = meta["config"]["llm"]
    if llm:
        base = _hub_id(llm) or meta["editor"]["base"]
        return LLM_USAGE.format(parts=parts, said=said, base=base)
    return EDITOR_USAGE.format(parts=parts, said=said)


def _metadata(meta: Mapping[str, Any]) -> ModelCardData:
    if meta["stage"] in ("adapter", "edit"):
        return ModelCardData(license="apache-2.0", library_name="diffusers", tags=[*TAGS, "scenes"])
    return ModelCardData(
        license="other",
        license_name="flux-1-dev-non-commercial-license",
        license_link=FLUX_LICENCE,
        base_model=list(_parts(meta["config"]).values()),
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=TAGS,
    )


def _parts(config: Mapping[str, Any]) -> dict[str, str]:
    """Hub ids of FLUX and the encoders: the run's own, or where it had folders, the reference's."""
    preset = PRESETS["reference"]
    known = {"flux": FLUX, "clip": preset.clip, "dino": preset.dino}
    return {name: _hub_id(config.get(name)) or usual for name, usual in known.items()}


def _hub_id(value: Any) -> str | None:
    """None for a folder: where things lay on the machine that trained is nobody's business."""
    path = Path(value) if isinstance(value, str) else None
    if path is None or path.is_absolute() or path.exists() or len(path.parts) != 2:
        return None
    return value if path.parts[0] not in (".", "..") else None


def _about(meta: Mapping[str, Any], scenes: bool) -> str:
    counts = meta["adapter"]["tokens_per_node"]
    tree = Hierarchy(tuple(counts))
    levels = ", ".join(
        f"{count} {'for the picture' if level == 0 else f'for each of its {4**level} parts'}"
        for level, count in enumerate(counts)
    )
    decoder = "the frozen decoder of the scenes world" if scenes else "a frozen FLUX.1-dev"
    text = (
        f"A semantic diffusion adapter: it turns a picture into {tree.num_tokens} embedding\n"
        f"positions ({levels}),\nfrom which {decoder} rebuilds the scene. For "
        f"sda-fast {_version()}."
    )
    rehearsed = meta["config"].get("rehearsal", "none") != "none"
    return f"{text}\n\n{REHEARSED}" if rehearsed else text


def _usage(meta: Mapping[str, Any], scenes: bool) -> str:
    adapter, config = meta["adapter"], meta["config"]
    tree = Hierarchy(tuple(adapter["tokens_per_node"]))
    sizes = {"positions": tree.num_tokens, "channels": adapter["out_features"]}
    if scenes:
        return SCENES_USAGE.format(size=_world_size(meta), **sizes)
    sizes |= {"size": config["encoder_size"], "side": config["resolution"]}
    return USAGE.format(squash=config["squash"], **_parts(config), **sizes)


def _training(meta: Mapping[str, Any]) -> str:
    config = meta["config"]
    pictures = meta["step"] * config["batch_size"]
    head = f"Recipe {_plain(meta['recipe'])}, step {meta['step']:,} of {config['steps']:,}, "
    head += f"{pictures:,} pictures; averaged weights."
    # a rehearsal's adapter may be smaller than its recipe says
    known = {**config, **meta.get("adapter", {}), **meta.get("editor", {})}
    known["llm"] = meta.get("editor", {}).get("base")  # no folder of this machine
    known = {name: known[name] for name in SHOWN if known.get(name) is not None}
    return f"{head}\n\n{_table(('field', 'value'), known)}"


def _evaluation(evaluated: tuple[int, Mapping[str, float]] | None) -> str:
    if evaluated is None:
        return "Not evaluated."
    step, numbers = evaluated
    rows = {name.replace("_", " "): f"{value:.4g}" for name, value in numbers.items()}
    table = _table(("on pictures never trained on", "value"), rows)
    return f"At step {step:,}, by the averaged weights:\n\n{table}"


def _licences(scenes: bool, opened: bool) -> str:
    return SCENES_LICENCE if scenes else LICENCES.format(opened=OPENED if opened else "")


def _world_size(meta: Mapping[str, Any]) -> int:
    from train.stage import WORLDS

    return WORLDS[meta["config"]["world"]].size


def _version() -> str:
    import sda_fast

    return sda_fast.__version__


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_plain(name)} | {_plain(_words(value))} |" for name, value in rows.items()]
    return "\n".join(lines)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    one = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in one)
