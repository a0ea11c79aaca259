"""RMSNorms of q and k ahead of the rotation, on the CPU: torch's own, and what they learn."""

import pytest
import torch

from sda_fast import ops

from .numerics import DTYPES, LOGITS
from .test_rope3d_attention import assert_good, draw, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(("head_dim", "places"), [(16, True), (64, True), (80, False)])
def test_norms_come_before_the_rotation(head_dim, places, logits, dtype):
    """And their weights learn; the reference goes through torch's own RMSNorm."""
    qkv, d_out, coords = draw(head_dim=head_dim, logits=logits, dtype=dtype)
    coords = coords if places else (None, None)
    assert_good([*qkv, *weights(head_dim, dtype)], d_out, coords)


def test_norms_are_those_of_torch_bit_for_bit():
    (q, k, v), _, coords = draw()
    norms = [torch.nn.RMSNorm(16, eps=1e-6) for _ in range(2)]
    for norm, weight in zip(norms, weights(16), strict=True):
        norm.weight.data = weight
    before = ops.rope3d_attention(norms[0](q), norms[1](k), v, *coords)
    fused = ops.rope3d_attention(q, k, v, *coords, norms=tuple(n.weight for n in norms))
    assert torch.equal(fused, before)


def test_norms_of_another_dtype_keep_it():
    """As under autocast, which casts q, k and v alone."""
    (q, k, v), _, coords = draw()
    norms = [w.requires_grad_() for w in weights(16)]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.rope3d_attention(q, k, v, *coords, norms=norms)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert [w.grad.dtype for w in norms] == [torch.float32] * 2


def test_gradcheck_with_norms():
    qkv, _, coords = draw(heads=1, grid=(2, 2))
    inputs = [t.double().requires_grad_() for t in (*qkv, *weights(16))]
    attend = lambda q, k, v, *norms: ops.rope3d_attention(q, k, v, *coords, norms=norms)
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


BAD = [
    (torch.ones(2, 16), "norms must be two weights, of q and of k, got Tensor"),
    ((torch.ones(16),), "norms must be two weights"),
    (
        (torch.ones(8), torch.ones(16)),
        r"norms must hold a \[16\] float weight of q on cpu, got \(8",
    ),
    ((torch.ones(16), None), "norms must hold .* of k on cpu, got NoneType"),
    ((torch.ones(16).int(),) * 2, r"norms must hold .* got \(16,\) torch.int32"),
    ((torch.ones(16, device="meta"),) * 2, "norms must hold .* on meta"),
]


@pytest.mark.parametrize(("norms", "message"), BAD)
def test_refuses(norms, message):
    qkv, _, coords = draw()
    with pytest.raises(ValueError, match=f"^rope3d_attention: .*{message}"):
        ops.rope3d_attention(*qkv, *coords, norms=norms)
