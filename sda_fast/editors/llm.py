"""An editor that is a causal language model: positions in and out as soft tokens."""

import copy
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from sda_fast.editors.llm_base import CausalBase, load_base
from sda_fast.editors.llm_config import (
    LORA_FOLDER,
    OWN_FILE,
    check_config,
    check_prompt,
    read_checked,
)
from sda_fast.editors.llm_lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    add_lora,
    check_fits,
    lora_modules,
    read_lora,
    require_peft,
    write_lora,
)
from sda_fast.editors.prediction import Prediction, result_of
from sda_fast.editors.result import EditResult, spread_instructions, unpack_source
from sda_fast.embedding import SemanticEmbedding
from sda_fast.files import moved_in_when_whole, write_whole
from sda_fast.flux_inputs import check_finite
from sda_fast.hierarchy import Hierarchy
from sda_fast.weights import read_safetensors, resolve_folder, write_safetensors


class LLMEditor(ModelMixin, ConfigMixin):
    """(embedding, instruction) -> embedding, by one pass of a Llama, Mistral or Qwen.

    Its prompt is the instruction, then the N positions, each through a linear and with a learned
    vector of its own, then N learned placeholders. The hidden states of the placeholders, through
    a linear that starts at zero, are added to the source: an editor that learned nothing changes
    nothing. Every position is written anew; there is no gate.

    The language model stays frozen and in evaluation mode; LoRA on its linears learns, and so do
    linears, vectors and placeholders. These alone are the module's parameters and state dict, and
    these alone are copied by ``copy.deepcopy``; ``to`` takes the language model along.

    Args:
        base: of ``load_base``; its model gets LoRA put on it, in place.
        tokens_per_node: of the ``Hierarchy`` of embeddings.
        channels: C of a position: 4096 for FLUX.
        lora_rank: of LoRA.
        max_length: tokens of the longest instruction.
        adapter: fingerprint of the adapter whose embeddings it learned; None: not known.

    Raises:
        ImportError: peft is not installed.
        ValueError: an argument that cannot be, or the language model takes no prompt that long.
    """

    config_name = "config.json"

    def __init__(
        self,
        base: CausalBase,
        tokens_per_node: Sequence[int] = (32, 8, 4),
        channels: int = 4096,
        lora_rank: int = 16,
        max_length: int = 64,
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        config = {
            "tokens_per_node": tokens_per_node, "channels": channels, "lora_rank": lora_rank,
            "max_length": max_length, "adapter": adapter,
        }  # fmt: skip
        check_config(config)
        self.tree = Hierarchy(tuple(tokens_per_node))
        check_prompt(base.model, self.tree, max_length)
        config["tokens_per_node"] = self.tree.tokens_per_node
        self.register_to_config(**config, base=base.name, base_fingerprint=base.fingerprint)
        self._tokenizer = base.tokenizer
        self._wrapped: list[Any] = [add_lora(base.model, lora_rank, base.name)]  # hidden, as frozen
        self.lora = lora_modules(self._wrapped[0])
        words = self.llm.get_input_embeddings().weight
        n, width = self.tree.num_tokens, words.shape[1]
        # soft tokens begin as long as the words between which they stand
        size = words.float().square().mean().sqrt().item()
        self.embed = nn.Linear(channels, width)
        nn.init.normal_(self.embed.weight, std=size * channels**-0.5)
        self.positions = nn.Parameter(size * torch.randn(n, width))
        self.placeholders = nn.Parameter(size * torch.randn(n, width))
        self.project = nn.Linear(width, channels)
        for parameter in (self.embed.bias, self.project.weight, self.project.bias):
            nn.init.zeros_(parameter)

    @property
    def llm(self) -> Any:
        """The language model of transformers, with LoRA on it."""
        return self._wrapped[0].get_base_model()

    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids of instructions, with what the tokenizer itself puts around them.

        Args:
            texts: B instructions.

        Returns:
            (text int64 [B, T], mask bool [B, T], True at what was said), on the editor's device.

        Raises:
            ValueError: there are none, or one is empty or longer than ``max_length``.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"instruction must be a list of at least one, got {texts!r}")
        rows = [row.ids for row in self._tokenizer.encode_batch(list(texts))]
        for text, row in zip(texts, rows, strict=True):
            if not text.strip() or not row:
                raise ValueError(f"instruction must be a text that says something, got {text!r}")
            limit = self.config["max_length"]
            if len(row) > limit:
                raise ValueError(
                    f"instruction must fit {limit} tokens, got {len(row)}: {text[:80]!r}"
                )
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        sizes = torch.tensor([len(row) for row in rows], device=self.device)
        return ids, torch.arange(longest, device=self.device) < sizes[:, None]

    def forward(
        self, source: Tensor, text: Tensor, mask: Tensor, target: Tensor | None = None
    ) -> Prediction:
        """What the editor says, in training and in use alike.

        Args:
            source: [B, N, C].
            text: int64 [B, T], token ids.
            mask: bool [B, T], True at what was said; the rest may lie anywhere and changes nothing.
            target: is not read; here because other editors are taught by it.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        self._check_inputs(source, text, mask)
        n, llm = self.tree.num_tokens, self.llm
        words = llm.get_input_embeddings()(text)
        known = self.embed(source.to(self.embed.weight.dtype)) + self.positions
        asked = self.placeholders.expand(len(source), -1, -1)
        prompt = torch.cat([words, known.to(words.dtype), asked.to(words.dtype)], dim=1)
        seen = F.pad(mask.long(), (0, 2 * n), value=1)
        hidden = llm.get_decoder()(
            inputs_embeds=prompt,
            attention_mask=seen,
            position_ids=seen.cumsum(dim=1) - 1,
            use_cache=False,
        ).last_hidden_state[:, -n:]
        change = self.project(hidden.to(self.project.weight.dtype))
        return Prediction(source + change.to(source.dtype))

    @torch.no_grad()
    def generate(self, source: Tensor, text: Tensor, mask: Tensor) -> Prediction:
        """``forward`` without gradients."""
        return self(source, text, mask)

    def edit(
        self, emb: SemanticEmbedding | EditResult, instruction: str | Sequence[str]
    ) -> EditResult:
        """See ``sda_fast.editors.result.Editor``.

        Device, dtype and pooled vector of the embedding are kept; the edited positions are those
        that changed by more than ``TOUCHED``.

        Raises:
            ValueError: of another hierarchy or width, with a NaN, or an empty or over-long
                instruction.
            FloatingPointError: the editor's own numbers are not finite.
        """
        source, parent = unpack_source(emb, self.tree, self.config["channels"])
        check_finite("emb", source.tokens)
        instructions = spread_instructions(instruction, len(source))
        text, mask = self.encode_text(instructions)
        tokens = source.tokens.to(self.device, self.dtype)
        found = self.generate(tokens, text, mask)
        return result_of(found, tokens, source, instructions, parent)

    @classmethod
    def from_base(
        cls,
        base: str | PathLike[str],
        tokens_per_node: Sequence[int] = (32, 8, 4),
        channels: int = 4096,
        lora_rank: int = 16,
        max_length: int = 64,
        adapter: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "LLMEditor":
        """A new editor around a language model.

        Args:
            base: folder or hub id, see ``load_base``.
            tokens_per_node: see the class, as the next four.
            channels: likewise.
            lora_rank: likewise.
            max_length: likewise.
            adapter: likewise.
            dtype: of the language model; what learns is in f32.

        Raises:
            ImportError: peft is not installed.
            OSError: base is not there.
            ValueError: see ``load_base`` and the class.
        """
        config = {
            "tokens_per_node": tokens_per_node, "channels": channels, "lora_rank": lora_rank,
            "max_length": max_length, "adapter": adapter,
        }  # fmt: skip
        require_peft()
        check_config(config)  # before gigabytes are read
        return cls(load_base(base, dtype), **config)

    # pyrefly: ignore[bad-override]
    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write config.json, editor.safetensors and lora/, over an earlier save once whole.

        ``lora/`` is what peft itself reads and writes. Of the language model only its name and its
        fingerprint are kept.

        Args:
            save_directory: created if it is not there; other files in it stay.

        Raises:
            OSError: it is a file, or something cannot be written.
        """
        root, key = Path(save_directory), str(self.config_name)
        with moved_in_when_whole(root, key, lambda name: name == OWN_FILE) as scratch:
            write_whole(scratch / key, self.to_json_string())
            write_safetensors(scratch / OWN_FILE, self._own_state())
            with moved_in_when_whole(
                root / LORA_FOLDER, CONFIG_FILE, lambda name: name == WEIGHTS_FILE
            ) as lora:
                write_lora(self._wrapped[0], lora)
                # all is written; from here to the end the folder has no config and is refused
                (root / key).unlink(missing_ok=True)

    @classmethod
    # pyrefly: ignore[bad-override]
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        base: str | PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> "LLMEditor":
        """Load what ``save_pretrained`` wrote around the language model that it was trained on.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            base: folder or hub id of the language model; None: as the config names it.
            dtype: of the language model; what learned is in f32.
            local_files_only: take hub ids from the cache alone.

        Raises:
            ImportError: peft is not installed.
            OSError: a folder is not there, or the hub is out of reach.
            ValueError: the config is another model's, base is another model, or weights are
                pickled, truncated or foreign.
        """
        require_peft()
        folder = resolve_folder(pretrained_model_name_or_path, "editor", local_files_only)
        config = read_checked(folder, cls.__name__)
        name, wanted = config.pop("base"), config.pop("base_fingerprint")
        loaded = load_base(name if base is None else base, dtype, local_files_only, wanted)
        editor = cls(loaded, **config)
        own = read_safetensors(folder / OWN_FILE)
        check_fits(own, editor._own_state(), folder / OWN_FILE)
        read_lora(editor._wrapped[0], folder / LORA_FOLDER)
        editor.load_state_dict(own, strict=False)
        editor.register_to_config(base=name)
        return editor.eval()

    def _own_state(self) -> dict[str, Tensor]:
        """What learns beside LoRA."""
        return {n: t for n, t in self.state_dict().items() if not n.startswith("lora.")}

    def _check_inputs(self, source: Tensor, text: Tensor, mask: Tensor) -> None:
        wanted = self.tree.num_tokens, self.config["channels"]
        if source.ndim != 3 or tuple(source.shape[1:]) != wanted:
            raise ValueError(f"source must be [B, {wanted[0]}, {wanted[1]}], got {[*source.shape]}")
        if text.ndim != 2 or len(text) != len(source) or text.dtype != torch.int64:
            raise ValueError(
                f"text must be int64 [{len(source)}, T], got {text.dtype} {[*text.shape]}"
            )
        if mask.shape != text.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool {[*text.shape]}, got {mask.dtype} {[*mask.shape]}")

    def _apply(self, fn: Callable, recurse: bool = True) -> "LLMEditor":
        super()._apply(fn, recurse)
        self._wrapped[0]._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "LLMEditor":
        """A copy that shares what is frozen: the average of a training run needs no second LLM."""
        own = {id(p) for p in self.parameters()}
        memo |= {id(p): p for p in self.llm.parameters() if id(p) not in own}
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
