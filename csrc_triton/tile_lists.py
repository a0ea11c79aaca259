"""What a launcher of joint attention is told of the mask: a few integers a token and a tile.

Every token has two sets of bits, one for node rows and one for node columns of all levels. A query
may attend to a key iff both pairs of sets meet; which bits are set is the rule. Patches share
theirs: an image needs one set a patch row and one a patch column.
"""

from dataclasses import dataclass

from torch import Tensor

TILE_FIELDS = 8
"""row start, row stop, first and last+1 gathered txt entry, first and last+1 block entry, dense
start, dense stop: token numbers, or places in `entries`."""
TO_TXT, TO_IMG, AS_KEY = range(3)
"""The roles of a token, in the order of the tables of bits."""


@dataclass(frozen=True, eq=False)
class TileLists:
    """The work of each program of one kernel, on the device.

    Attributes:
        shape: [8] int32 num_txt, S, then rows and columns of the image and its tokens, columns of
            the source picture, and how many bits of rows and of columns a role has.
        row_bits: [3, num_txt + rows + source rows] of each role, int32, int64 for six levels.
        col_bits: [3, num_txt + columns + source columns], as row_bits.
        tiles: [T, TILE_FIELDS] int32, one record a tile.
        entries: int32, txt tokens to gather and first tokens of blocks that need the mask.
        has_blocks: whether any tile lists a masked block.
        has_dense: whether any tile has a dense range.
        nbytes: of all tensors together.
    """

    shape: Tensor
    row_bits: Tensor
    col_bits: Tensor
    tiles: Tensor
    entries: Tensor
    has_blocks: bool
    has_dense: bool
    nbytes: int

    @property
    def num_tiles(self) -> int:
        """T."""
        return self.tiles.shape[0]
