"""What holds of the kernels of joint attention bit for bit, and as operators of torch."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from csrc_triton import tiles as tiles_module
from csrc_triton.joint_attention import launch_joint_attention
from csrc_triton.joint_attention_backward import (
    launch_joint_attention_dkdv,
    launch_joint_attention_dq,
)
from csrc_triton.tile_lists import AS_KEY, TO_TXT, TileLists
from csrc_triton.tiles import Tile, forced
from sda_fast import ops
from sda_fast.hierarchy import RULES, Hierarchy
from sda_fast.reference.dense_attention import dense_attention

from .attention_cases import CASES, SMALL, Case, draw, sliced
from .joint_tiles import implementations, on
from .numerics import DTYPES, LOGITS, run_attention

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_out_is_written_into_a_slice_of_a_wider_buffer(implementation, dtype, tiles, device):
    case = CASES["ragged"]
    if implementation == "split" and device.type == "cuda" and dtype == torch.float32:
        pytest.skip("the vendors' kernels take half precision only")
    qkv = on(device, draw(case, dtype=dtype)[0])
    op = case.bind(ops.hierarchical_attention, implementation=implementation)
    expected, expected_lse = op(*qkv)
    batch, length, heads, head_dim = case.shape
    buffer = torch.full((batch, length, heads * head_dim + 32), 7.0, dtype=dtype, device=device)
    out = buffer[..., : heads * head_dim].unflatten(-1, (heads, head_dim))
    got, lse = case.bind(ops.hierarchical_attention, implementation=implementation, out=out)(*qkv)
    assert got is out
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert (buffer[..., heads * head_dim :] == 7).all()


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_a_sample_alone_equals_itself_in_a_batch(implementation, tiles, device):
    case = CASES["ragged"]._replace(heads=2)
    qkv, d_out = draw(case, dtype=torch.bfloat16)
    qkv, d_out = on(device, qkv), d_out.to(device)
    op = case.bind(ops.hierarchical_attention, implementation=implementation)
    alone = run_attention(op, [t[1:] for t in qkv], d_out[1:])
    for a, b in zip(alone, run_attention(op, qkv, d_out), strict=True):
        assert torch.equal(a, b[1:])


@pytest.mark.parametrize("rule", RULES)
def test_a_row_depends_on_the_keys_it_sees_and_on_no_other_bit(rule, tiles, device):
    case = CASES["ragged"]._replace(options={"rule": rule}, batch=1)
    q, k, v = on(device, draw(case, dtype=torch.bfloat16)[0])
    mask = case.tree.attention_mask(case.h, case.w, rule).to(device)
    for implementation in implementations(rule):
        op = case.bind(ops.hierarchical_attention, implementation=implementation)
        before = op(q, k, v)[0]
        for key in (case.tree.span("/3/0").start, case.shape[1] - 1):
            k2, v2 = k.clone(), v.clone()
            k2[:, key] = torch.randn(k[:, key].shape).to(k)
            v2[:, key] = torch.randn(v[:, key].shape).to(v)
            same = op(q, k2, v2)[0].eq(before).flatten(2).all(-1)
            assert torch.equal(same, ~mask[:, key].expand_as(same))


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_repeats_are_bitwise_equal(implementation, tiles, device):
    case = CASES["ragged"]._replace(batch=1)
    qkv, d_out = draw(case, dtype=torch.bfloat16)
    qkv, d_out = on(device, qkv), d_out.to(device)
    op = case.bind(ops.hierarchical_attention, implementation=implementation)
    first = run_attention(op, qkv, d_out)
    for a, b in zip(first, run_attention(op, qkv, d_out), strict=True):
        assert torch.equal(a, b)


def test_twice_the_values_give_twice_the_output(tiles, device):
    q, k, v = on(device, draw(SMALL)[0])
    op = SMALL.bind(ops.hierarchical_attention, implementation="fused")
    assert torch.equal(op(q, k, 2 * v)[0], 2 * op(q, k, v)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_largest_finite_inputs_give_no_infinity(dtype, tiles, device):
    (q, k, v), d_out = draw(SMALL, dtype=dtype)
    qkv, d_out = on(device, (q, k, v.sign() * 60000)), (d_out * 1e-4).to(device)
    got = run_attention(SMALL.bind(ops.hierarchical_attention, implementation="fused"), qkv, d_out)
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_offsets_past_two_to_the_31_elements(implementation, tiles, device):
    """Tokens 2**26 elements apart; no page between them is ever touched on the CPU."""
    case = Case(1, 2, 16, (3, 1), 4, 9, {"rule": "overlap"})
    _, length, _, head_dim = case.shape
    apart = 2**26
    # numpy's zeros are the system's own: a page is there once it is touched
    base = torch.from_numpy(np.zeros(apart * length, np.int16)).view(torch.bfloat16).to(device)
    assert base.numel() > 2**31
    far = [
        base.as_strided(case.shape, (1, apart, head_dim, 1), 4096 * i).copy_(
            torch.randn(case.shape)
        )
        for i in range(4)
    ]
    q, k, v, d_out = far
    op = case.bind(ops.hierarchical_attention, implementation=implementation)
    expected = run_attention(op, [t.contiguous() for t in (q, k, v)], d_out.contiguous())
    for a, b in zip(run_attention(op, (q, k, v), d_out), expected, strict=True):
        assert torch.equal(a, b)
    near = [t.contiguous() for t in (q, k, v)]
    out = base.as_strided(case.shape, (1, apart, head_dim, 1))
    case.bind(ops.hierarchical_attention, implementation=implementation, out=out)(*near)
    assert torch.equal(out, expected.out)


def hand_made(num_txt, num_img, tiles, entries, txt_key_rows, device, has_blocks, has_dense):
    """Lists whose image is one row: every patch shows every bit, txt tokens what is given."""
    rows = torch.full((3, num_txt + 1), -1, dtype=torch.int32)
    cols = torch.full((3, num_txt + num_img), -1, dtype=torch.int32)
    rows[AS_KEY, :num_txt] = torch.tensor(txt_key_rows, dtype=torch.int32)
    length = num_txt + num_img
    shape = [num_txt, length, 1, num_img, num_img, num_img, num_txt + 1, length]
    tables = (torch.tensor(t, dtype=torch.int32) for t in (tiles, entries or [0]))
    return TileLists(
        torch.tensor(shape, dtype=torch.int32).to(device), rows.to(device), cols.to(device),
        *(t.to(device) for t in tables), has_blocks, has_dense, 0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_sees_nothing_is_zero_with_an_lse_of_minus_infinity(dtype, device):
    """Lists by hand, since no rule leaves a token without keys: 16 txt keys of which none shows a
    bit, 16 image rows that are given nothing else."""
    q, k, v, d_out = (torch.randn(1, 32, 2, 16).to(device, dtype) for _ in range(4))
    tile = Tile(16, 16, 4, 2, 16)
    txt_only = [[0, 16, 0, 16, 16, 16, 0, 0], [16, 32, 0, 16, 16, 16, 0, 0]]
    lists = hand_made(16, 16, txt_only, [*range(16)], [0] * 16, device, False, False)
    out = torch.empty_like(q)
    lse = launch_joint_attention(q, k, v, out, 0.25, lists, tile)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    dq, delta = launch_joint_attention_dq(d_out, (q, k, v), out, lse, 0.25, lists, tile)
    by_key = [[0, 16, 0, 0, 0, 2, 0, 0], [16, 32, 0, 0, 0, 0, 0, 0]]
    lists = hand_made(16, 16, by_key, [0, 16], [0] * 16, device, True, False)
    dk, dv = launch_joint_attention_dkdv(d_out, (q, k, v), lse, delta, 0.25, lists, tile)
    for grad in (dq, dk, dv):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("logits", LOGITS)
def test_a_first_tile_that_is_masked_for_some_rows(logits, device):
    """Half of the rows see none of the 16 txt keys that come first, then all see the image."""
    case = Case(1, 1, 16, (16,), 1, 16, {"rule": "overlap"})
    q, k, v = on(device, draw(case, logits)[0])
    tile = Tile(16, 16, 4, 2, 16)
    rows = [[0, 16, 0, 16, 16, 16, 16, 32], [16, 32, 0, 16, 16, 16, 16, 32]]
    lists = hand_made(16, 16, rows, [*range(16)], [1] * 16, device, False, True)
    lists.row_bits[TO_TXT, 8:16] = 2  # txt queries 8 to 15 show another bit than the txt keys
    out = torch.empty_like(q)
    lse = launch_joint_attention(q, k, v, out, 0.25, lists, tile)
    mask = torch.ones(32, 32, dtype=torch.bool, device=device)
    mask[8:16, :16] = False
    exact, exact_lse = dense_attention(*(t.double() for t in (q, k, v)), mask, 0.25)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=2e-5)


def test_tiles_that_list_more_than_they_see_change_no_bit(device):
    """Masked keys, gathered or in blocks, leave accumulator, maximum and sum as they are."""
    q, k, v = (torch.randn(1, 32, 2, 16).to(device) for _ in range(3))
    tile, seen = Tile(16, 16, 4, 2, 16), [1] * 8 + [0] * 8
    out, more = torch.empty_like(q), torch.empty_like(q)
    few = [[0, 16, 0, 8, 8, 8, 16, 32], [16, 32, 0, 8, 8, 8, 16, 32]]
    lists = hand_made(16, 16, few, [*range(8)], seen, device, False, True)
    lse = launch_joint_attention(q, k, v, out, 0.25, lists, tile)
    many = [[0, 16, 0, 40, 40, 40, 16, 32], [16, 32, 0, 40, 40, 40, 16, 32]]
    listed = [*range(8), *[8] * 8, *[15] * 24]
    lists = hand_made(16, 16, many, listed, seen, device, False, True)
    assert torch.equal(launch_joint_attention(q, k, v, more, 0.25, lists, tile), lse)
    assert torch.equal(more, out)


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_opcheck(implementation, tiles, device):
    case = Case(1, 1, 16, (2, 1), 3, 5, {"rule": "overlap"})
    (_, k, v), d_out = draw(case, dtype=torch.bfloat16)
    q, k, v = on(device, (sliced(case.shape, torch.bfloat16), k, v))
    layout = list(case.tokens_per_node), case.h, case.w, "overlap", 0, 0, [], 0.25, implementation
    inputs = [t.requires_grad_() for t in (q, k, v)]
    namespace = torch.ops.sda_fast
    torch.library.opcheck(namespace.hierarchical_attention.default, (*inputs, *layout, True))
    out, lse = namespace.hierarchical_attention(q, k, v, *layout, True)
    plain = [t.detach() for t in (q, k, v)]
    torch.library.opcheck(
        namespace.hierarchical_attention_backward.default,
        (d_out.to(device), *plain, out.detach(), lse, *layout, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        namespace.hierarchical_attention_out.default,
        (*plain, torch.zeros_like(out), *layout),
        test_utils=("test_schema", "test_faketensor"),
    )


class JointAttention(torch.nn.Module):
    def __init__(self, tree: Hierarchy, implementation: str):
        super().__init__()
        self.tree, self.implementation = tree, implementation
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x, h, w):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return ops.hierarchical_attention(
            q, k, v, self.tree, h, w, "local", implementation=self.implementation
        ).flatten(2)


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_compiles_whole_for_several_sizes_and_recomputes_in_a_checkpoint(
    implementation, tiles, device
):
    tree = Hierarchy((2, 1))
    module = JointAttention(tree, implementation).to(device, torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for h, w in ((3, 4), (5, 2)):
        x = torch.randn(2, tree.num_tokens + h * w, 32).to(device, torch.bfloat16)
        again = lambda x, h, w: checkpoint(module, x, h, w, use_reentrant=False)
        grads = [
            torch.autograd.grad(f(x, h, w).float().square().sum(), module.qkv.weight)[0]
            for f in (module, compiled, again)
        ]
        assert torch.equal(grads[0], grads[2])
        torch.testing.assert_close(grads[0], grads[1])


def test_autocast_casts_as_torch_attention_does(tiles, device):
    q, k, v = on(device, draw(SMALL)[0])
    op = SMALL.bind(ops.hierarchical_attention, implementation="fused")
    with torch.autocast(device.type, torch.bfloat16):
        out, lse = op(q, k.bfloat16(), v.half())
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, op(q.bfloat16(), k.bfloat16(), v.half().bfloat16())[0])


def test_auto_is_the_table_s_choice_bit_for_bit(tiles, device):
    qkv, d_out = draw(SMALL, dtype=torch.bfloat16)
    qkv, d_out = on(device, qkv), d_out.to(device)
    auto = run_attention(SMALL.bind(ops.hierarchical_attention), qkv, d_out)
    fused = run_attention(
        SMALL.bind(ops.hierarchical_attention, implementation="fused"), qkv, d_out
    )
    for a, b in zip(auto, fused, strict=True):
        assert torch.equal(a, b)


def test_split_refuses_a_rule_under_which_image_tokens_do_not_all_see_each_other(device):
    qkv = on(device, draw(SMALL)[0])
    with pytest.raises(ValueError, match="implementation 'split' needs a rule under which"):
        SMALL.bind(ops.hierarchical_attention, implementation="split")(*qkv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about the interpreter")
def test_an_interpreter_that_gets_bfloat16_wrong_is_not_used_for_it():
    """As Triton ships it: "auto" takes torch's attention, the kernels are refused."""
    code = (
        "import torch\n"
        "from sda_fast import Hierarchy, ops\n"
        "q = torch.randn(1, 9, 1, 16).bfloat16()\n"
        "run = lambda **how: ops.hierarchical_attention(q, q, q, Hierarchy((5,)), 2, 2, **how)\n"
        "exact = torch.nn.functional.scaled_dot_product_attention(\n"
        "    *3 * [q.float().transpose(1, 2)]).transpose(1, 2)\n"
        "assert (run().float() - exact).abs().max() < 0.02\n"
        "assert (ops.rope3d_attention(q, q, q, None, None).float() - exact).abs().max() < 0.02\n"
        "try: run(implementation='fused')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert "Triton's interpreter, which gets bfloat16 wrong" in done.stdout


def test_a_head_dim_without_a_kernel_is_refused_where_a_kernel_is_asked_for(device):
    case = SMALL._replace(head_dim=24)
    qkv = on(device, draw(case)[0])
    with pytest.raises(ValueError, match="q must have D in 16, 32, 64, 128 for the kernels"):
        case.bind(ops.hierarchical_attention, implementation="fused")(*qkv)


def test_forced_tiles_must_be_named_after_kernels():
    with pytest.raises(ValueError, match=r"named after forward, .*, got \['backward'\]"):
        forced(backward=Tile(16, 16, 4, 2, 16)).__enter__()


def test_the_table_chooses_by_every_size_it_names(monkeypatch):
    wide = tiles_module.Problem(torch.bfloat16, 128, 512, 4096, 96)
    entry = tiles_module.Entry("dq", Tile(64, 64, 4, 2), "a test", min_img=4096, min_txt=512)
    monkeypatch.setattr(tiles_module, "ENTRIES", (entry, *tiles_module.ENTRIES))
    choose = tiles_module.choose_tile
    assert choose("dq", "fused", wide) == entry.tile
    for smaller in ({"num_txt": 511}, {"num_img": 4095}):
        assert choose("dq", "fused", replace(wide, **smaller)) != entry.tile
    assert choose("forward", "fused", wide) != entry.tile
    with pytest.raises(ValueError, match="has no tile for"):
        choose("dq", "fused", replace(wide, dtype=torch.float64))
