"""Where the tokens of a FLUX forward are: their grids, and the rotation that comes of them."""

import math
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sda_fast.attachment import read_grids
from sda_fast.hierarchy import Hierarchy
from sda_fast.ops import hierarchical_attention

MOST_TOKENS = 2 * 128 * 128
"""Image tokens that were tested: a picture of 2048 x 2048 pixels and a source of that size."""
REMEMBERED = 4  # layouts: a pipeline may take turns with two, as with a negative prompt

Ids = tuple[Tensor, Tensor]
"""img_ids and txt_ids."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens of one forward.

    Attributes:
        grids: (rows, columns) of the image's tokens and, if any, of the source picture's.
        num_txt: text tokens, the hierarchy's positions first.
        rotary: cos and sin, [S, D] float32, text first.
    """

    grids: tuple[tuple[int, int], ...]
    num_txt: int
    rotary: tuple[Tensor, Tensor]

    @property
    def key(self) -> tuple:
        """What an attention depends on, beside tree and rule."""
        return self.grids, self.num_txt

    def attention(self, tree: Hierarchy, rule: str, isolate_level: int) -> Callable[..., Tensor]:
        """q, k, v [B, S, H, D] -> [B, S, H, D]."""
        (h, w), *source = self.grids
        return partial(
            hierarchical_attention,
            tree=tree,
            h=h,
            w=w,
            rule=rule,
            extra_text=self.num_txt - tree.num_tokens,
            isolate_level=isolate_level,
            source=source[0] if source else None,
        )


class LayoutMemory:
    """Layouts, remembered while the same ids come again: to read them waits for the device.

    Args:
        pos_embed: the transformer's FluxPosEmbed.
    """

    def __init__(self, pos_embed: nn.Module) -> None:
        self._pos_embed = pos_embed
        self._read: deque[tuple[list[weakref.ref[Tensor]], list[int], Layout]] = deque(
            maxlen=REMEMBERED
        )
        self._made: dict[tuple, Layout] = {}

    def __deepcopy__(self, memo: dict) -> "LayoutMemory":
        return LayoutMemory(memo.get(id(self._pos_embed), self._pos_embed))

    def read(self, img_ids: Tensor, txt_ids: Tensor, tree: Hierarchy) -> Layout:
        """The layout that a forward's ids tell of.

        Args:
            img_ids: [S_img, 3], or [1, S_img, 3].
            txt_ids: [S_txt, 3], or [1, S_txt, 3].
            tree: the hierarchy of the first text tokens.

        Raises:
            ValueError: img_ids are no grids, or there are too few or too many tokens.
        """
        ids = txt_ids, img_ids
        # tensors of inference mode count no versions, so that a change would go unseen
        versions = [-1 if t.is_inference() else t._version for t in ids]
        for seen, then, layout in self._read:
            same = all(ref() is t for ref, t in zip(seen, ids, strict=True))
            if same and then == versions and min(then) >= 0:
                return layout
        txt, img = (t[0] if t.ndim == 3 else t for t in ids)
        layout = self._make(tuple(read_grids(img)), txt, img, tree)
        self._read.append(([weakref.ref(t) for t in ids], versions, layout))
        return layout

    def of_grid(
        self,
        x: Tensor,
        tree: Hierarchy,
        grid: tuple[int, int] | None,
        num_txt: int | None = None,
    ) -> Layout:
        """The layout of [B, S_img, C] latents and of positions, without any ids to read.

        Args:
            x: the latents.
            tree: of the positions.
            grid: (rows, columns) of image tokens; None for a square.
            num_txt: text tokens; None for the positions alone.

        Raises:
            ValueError: x does not hold such a grid.
        """
        if x.ndim != 3:
            raise ValueError(f"x_t must be packed latents [B, S_img, C], got {list(x.shape)}")
        side = math.isqrt(x.shape[1])
        h, w = grid or (side, side)
        if h * w != x.shape[1]:
            raise ValueError(
                f"grid must hold the {x.shape[1]} tokens of x_t, got {grid or 'none for no square'}"
            )
        num_txt = tree.num_tokens if num_txt is None else num_txt
        key = (h, w), tree, num_txt, x.device
        if key not in self._made:
            row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            ids = torch.stack([torch.zeros(h, w), row, col], -1).flatten(0, 1)
            txt = torch.zeros(num_txt, 3, device=x.device)
            if len(self._made) >= REMEMBERED * 16:
                self._made.clear()
            self._made[key] = self._make(((h, w),), txt, ids.to(x.device), tree)
        return self._made[key]

    def _make(
        self, grids: tuple[tuple[int, int], ...], txt: Tensor, img: Tensor, tree: Hierarchy
    ) -> Layout:
        if len(txt) < tree.num_tokens:
            raise ValueError(
                f"txt_ids must hold the {tree.num_tokens} positions of {tree} first, got {len(txt)}"
            )
        if len(img) > MOST_TOKENS:
            raise ValueError(
                f"img_ids must tell of at most {MOST_TOKENS} image tokens, the most that were "
                f"tested, got {len(img)}"
            )
        # what is made here outlives any mode
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = self._pos_embed(torch.cat([txt.to(img.device), img]))
        return Layout(grids, len(txt), (cos, sin))
