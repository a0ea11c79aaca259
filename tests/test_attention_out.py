"""``out=`` of hierarchical_attention: where it may lie, and that it is written and nothing else."""

import pytest
import torch

from sda_fast import ops

from .attention_cases import CASES, SMALL, draw
from .numerics import DTYPES


@pytest.mark.parametrize("shared", range(3))
def test_out_in_the_memory_of_an_input_is_refused(shared):
    qkv = draw(SMALL)[0]
    op = SMALL.bind(ops.hierarchical_attention, out=qkv[shared])
    with pytest.raises(ValueError, match="out must not share memory with q, k or v"):
        op(*qkv)


def test_out_in_other_columns_of_the_same_rows_is_taken():
    batch, length, heads, head_dim = SMALL.shape
    rows = torch.randn(batch, length, 4, heads, head_dim)
    q, k, v, out = rows.unbind(2)
    expected, _ = SMALL.bind(ops.hierarchical_attention)(*(t.clone() for t in (q, k, v)))
    SMALL.bind(ops.hierarchical_attention, out=out)(q, k, v)
    assert torch.equal(out, expected)
    later = rows.as_strided(SMALL.shape, out.stride(), out.storage_offset() - 4)
    with pytest.raises(ValueError, match="out must not share memory"):
        SMALL.bind(ops.hierarchical_attention, out=later)(q, k, v)


def test_out_compiles_whole():
    (q, k, v), _ = draw(SMALL)
    batch, length, heads, head_dim = SMALL.shape

    def attend(buffer):
        out = buffer[..., 8:].unflatten(-1, (heads, head_dim))
        SMALL.bind(ops.hierarchical_attention, out=out)(q, k, v)
        return 2 * buffer

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    buffer = torch.ones(batch, length, heads * head_dim + 8)
    assert torch.equal(compiled(buffer.clone()), attend(buffer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_in_place_between_the_columns_of_a_wider_buffer(dtype):
    case = CASES["extra-text-and-source"]
    (q, k, v), _ = draw(case, dtype=dtype)
    expected, lse = case.bind(ops.hierarchical_attention)(q, k, v)
    batch, length, heads, head_dim = case.shape
    buffer = torch.full((batch, length, heads * head_dim + 8), 7.0, dtype=dtype)
    out = buffer[..., 8:].unflatten(-1, (heads, head_dim))
    got, got_lse = case.bind(ops.hierarchical_attention, out=out)(q, k, v)
    assert got is out
    assert torch.equal(out, expected)
    assert torch.equal(got_lse, lse)
    assert (buffer[..., :8] == 7).all()
