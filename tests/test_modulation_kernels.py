"""The kernels of adaptive norms against the reference, on the GPU or in Triton's interpreter."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from csrc_triton.modulation import PROGRAMS, rows_per_program, warps
from sda_fast import ops, reference

from .interpreter.sanitizer import sanitized
from .modulation_cases import (
    GATED,
    KINDS,
    PLAIN,
    assert_all_samples_alike,
    assert_far_is_near,
    assert_good,
    assert_same,
    draw,
    run,
)
from .numerics import DTYPES
from .test_modulation import MODULATION, Block, gradients

pytestmark = pytest.mark.usefixtures("kernels")

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the sanitizer watches the interpreter"
)
both = pytest.mark.parametrize("op", [PLAIN, GATED])
# rows for two programs where the modulation learns, the second not full; C is padded to 32
RAGGED = {"length": 9, "channels": 24}


# each operator meets each dtype and each kind of rows
@pytest.mark.parametrize(
    ("op", "kind", "dtype"),
    [
        ((PLAIN, GATED)[(i + j) % 2], kind, dtype)
        for i, kind in enumerate(KINDS)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_is_as_good_as_the_reference(op, kind, dtype, device):
    assert_good(op, *draw(op, dtype=dtype, kind=kind, device=device, **RAGGED))


@pytest.mark.parametrize(
    ("op", "shape", "dtype"),
    [
        (op, shape, (torch.bfloat16, torch.float32)[(i + j) % 2])
        for i, op in enumerate((PLAIN, GATED))
        for j, shape in enumerate([(1, 1, 1), (2, 3, 5), (1, 9, 33), (2, 8, 64), (1, 2, 3072)])
    ],
)
def test_other_sizes(op, shape, dtype, device):
    assert_good(op, *draw(op, *shape, dtype=dtype, device=device))


@both
def test_the_widest_row(op, device):
    assert_good(op, *draw(op, 1, 1, 8192, torch.bfloat16, device=device))


@both
@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_modulation_may_have_another_dtype(rows, op, device):
    assert_good(op, *draw(op, dtype=torch.bfloat16, rows=rows, device=device))


@both
def test_strided_inputs_and_gradients(op, device):
    """Tokens along the wrong axis or cut out of wider rows, one modulation for all samples."""
    inputs, d_outs = draw(op, dtype=torch.bfloat16, device=device, **RAGGED)
    wide = torch.randn(9, 2, 40).to(device, torch.bfloat16)
    inputs["x"] = wide.transpose(0, 1)[..., 3:27]
    for name in set(MODULATION) & inputs.keys():
        inputs[name] = inputs[name][:1].expand(2, -1)
    assert_good(op, inputs, [d.mT.contiguous().mT for d in d_outs])
    expanded = [torch.randn(1).to(device, torch.bfloat16).expand(d.shape) for d in d_outs]
    assert_good(op, inputs, expanded)
    one_sample = wide[:, :1, 1:25].transpose(0, 1).expand(2, -1, -1)
    assert_good(op, inputs, [*d_outs[:-1], one_sample])


@both
def test_storage_that_ends_in_nan(op, device):
    inputs, d_outs = draw(op, dtype=torch.bfloat16, device=device, **RAGGED)
    pad = lambda t: torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]
    assert_good(op, {n: pad(t) for n, t in inputs.items()}, [pad(d) for d in d_outs])


@both
def test_a_constant_row_is_its_shift_and_learns_no_scale(op, device):
    """Whatever its value: that of float32's mean is another one."""
    inputs, d_outs = draw(op, device=device, **RAGGED)
    inputs["x"] = (torch.randn(2, 9, 1).to(device) * 1e4).repeat(1, 1, 24)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("y",) if name in inputs}
    found = run(getattr(ops, op), inputs, d_outs)
    assert found.out["normed"].eq(inputs["shift"][:, None]).all()
    assert found.grad["scale"].eq(0).all()


@both
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # inf - inf
def test_nan_and_inf_stay_in_their_rows(op, device):
    inputs, d_outs = draw(op, device=device, **RAGGED)
    tokens = [name for name in inputs if name not in MODULATION]
    before = run(getattr(ops, op), inputs, d_outs, learn=tokens)
    inputs["x"][0, 3, 5], inputs["x"][1, 7, 0] = float("nan"), float("inf")
    after = run(getattr(ops, op), inputs, d_outs, learn=tokens)
    assert after.out["normed"][0, 3].isnan().all()
    assert after.out["normed"][1, 7].isnan().all()
    for part in range(2):
        for name, t in after[part].items():
            t[0, 3], t[1, 7] = before[part][name][0, 3], before[part][name][1, 7]
    assert_same(after, before)


@both
def test_the_same_bits_again_alone_and_frozen(op, device):
    inputs, d_outs = draw(op, dtype=torch.bfloat16, device=device, **RAGGED)
    function = getattr(ops, op)
    first = run(function, inputs, d_outs)
    assert_same(run(function, inputs, d_outs), first)
    alone = run(function, {n: t[1:] for n, t in inputs.items()}, [d[1:] for d in d_outs])
    second = [{name: t[1:] for name, t in part.items()} for part in first]
    assert_same(alone, first._make(second))
    tokens = [name for name in inputs if name not in MODULATION]
    for one in (None, *(name for name in MODULATION if name in inputs)):
        found = run(function, inputs, d_outs, learn=[*tokens, *([one] if one else [])])
        assert_same(found, first._replace(grad={name: first.grad[name] for name in found.grad}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_taken_of_the_residual_as_it_is_carried_on(dtype, device):
    inputs, _ = draw(GATED, dtype=dtype, device=device, **RAGGED)
    s, normed = ops.gated_ada_norm(**inputs)
    assert torch.equal(normed, ops.ada_norm(s, inputs["shift"], inputs["scale"]))


@both
def test_eps_reaches_the_kernel(op, device):
    inputs, _ = draw(op, kind="small", device=device)
    got, default = getattr(ops, op)(**inputs, eps=1e-2), getattr(ops, op)(**inputs)
    torch.testing.assert_close(got, getattr(reference, op)(**inputs, eps=1e-2))
    assert (got[-1] - default[-1]).abs().max() > 1e-3


@both
@pytest.mark.parametrize("learns", [True, False])
def test_opcheck(learns, op, device):
    inputs, d_outs = draw(op, dtype=torch.bfloat16, device=device)
    leaves = {n: t.clone().requires_grad_(learns or n not in MODULATION) for n, t in inputs.items()}
    forward = getattr(torch.ops.sda_fast, op).default
    torch.library.opcheck(forward, (*leaves.values(), 1e-6))
    *outs, stats = forward(*inputs.values(), 1e-6)
    rows = [inputs[name] for name in MODULATION if name in inputs]
    saved = (inputs["x"],) if op == PLAIN else (outs[0], inputs["y"] if learns else None)
    torch.library.opcheck(
        getattr(torch.ops.sda_fast, f"{op}_backward").default,
        (*d_outs, *saved, stats, *rows, [learns] * len(rows)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_whole_for_other_sizes_and_recomputes_in_a_checkpoint(device):
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    again = lambda *args: checkpoint(block, *args, use_reentrant=False)
    for batch, length in ((2, 5), (3, 9)):
        x = torch.randn(batch, length, 16).to(device).requires_grad_()
        vec = torch.randn(batch, 8).to(device)
        plain, traced, recomputed = (
            gradients(f, block, x, vec) for f in (block, compiled, again)
        )  # fmt: skip
        torch.testing.assert_close(traced, plain)
        for a, b in zip(recomputed, plain, strict=True):
            assert torch.equal(a, b)


@interpreted
@both
@pytest.mark.parametrize("learn", [(), ("shift",), MODULATION], ids=str)
def test_no_stray_access_no_race_and_no_atomic(learn, op, device):
    inputs, d_outs = draw(op, dtype=torch.bfloat16, **RAGGED)
    inputs["x"] = torch.randn(9, 2, 40).bfloat16().transpose(0, 1)[..., 3:27]
    names = [n for n in inputs if n not in MODULATION or n in learn]
    with sanitized() as report:
        run(getattr(ops, op), inputs, d_outs, learn=names)
    report.assert_clean()
    assert report.launches == 2, "one a pass"


@interpreted
@both
def test_every_element_is_read_once_and_written_once(op):
    """Rows of the modulation are read by each token: they stay in L1."""
    inputs, d_outs = draw(op, **RAGGED)
    tokens, row, stats = inputs["x"].numel(), inputs["x"].shape[-1], 2 * 2 * 9
    outs, rows = len(d_outs), len(inputs) - len(d_outs)
    with sanitized() as report:
        getattr(ops, op)(**inputs)
    assert report.loads == outs * tokens + rows * tokens
    assert report.stores == outs * tokens + stats
    with sanitized() as report:
        run(getattr(ops, op), inputs, d_outs, learn=list(inputs)[:1])
    # the backward reads s, the gradients of the outputs, stats, and scale and gate
    assert report.loads == (outs + rows) * tokens + (1 + outs) * tokens + stats + outs * tokens
    assert report.stores == outs * tokens + stats + outs * tokens
    learned = -(-9 // rows_per_program(2 * 9)) * 2 * row
    with sanitized() as more:
        run(getattr(ops, op), inputs, d_outs)
    assert more.stores - report.stores == rows * learned
    # y, for the gradient of gate
    assert more.loads - report.loads == (tokens if op == GATED else 0)


@both
@pytest.mark.parametrize("axis", [0, 1], ids=["batch", "tokens"])
def test_rows_far_apart_in_memory(axis, op, device):
    assert_far_is_near(op, 1 << 12, axis, device=device, **RAGGED)


@both
def test_inputs_expanded_over_the_batch(op, device):
    assert_all_samples_alike(op, 3, device=device, **RAGGED)


@interpreted
@both
def test_what_the_kernels_do_not_take_runs_in_torch(op):
    for shape, dtype in (((1, 2, 8193), torch.float32), ((1, 2, 8), torch.float64)):
        with sanitized() as report:
            assert_good(op, *draw(op, *shape, dtype=dtype))
        assert report.launches == 0


@pytest.mark.parametrize("shapes", [(1, 4224), (4, 4224), (1, 1152), (2, 19), (1, 1), (64, 16384)])
def test_the_rule_of_rows(shapes):
    batch, length = shapes
    rows = rows_per_program(batch * length)
    assert rows in (8, 16, 32, 64)
    programs = batch * -(-length // rows)
    assert rows == 64 or programs <= 2 * PROGRAMS + batch
    assert rows == 8 or programs >= PROGRAMS / 2


def test_the_rule_of_warps():
    found = [warps(1 << i) for i in range(14)]
    assert found == sorted(found)
    assert (found[0], warps(4096), found[-1]) == (1, 4, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_kernels_that_cannot_run_are_refused_by_name(monkeypatch):
    """As CUDA tensors, which have no other way: here of a device that is made up."""
    from sda_fast.ops import modulation

    x = torch.empty(1, 2, 9000, device="meta")
    faults = modulation._kernel_faults(x)
    assert faults == ["x must have C up to 8192 for the kernels, got 9000"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    [fault] = modulation._kernel_faults(torch.empty(1, 2, 8))
    assert fault.startswith("x must be on a CUDA device for the kernels, got cpu")
