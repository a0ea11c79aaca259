import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from sda_fast import ops, reference
from sda_fast.hierarchy import RULES, Hierarchy
from sda_fast.ops.hierarchical_attention import _bias
from sda_fast.ops.joint_lists import Layout

from .attention_cases import CASES, SMALL, Case, draw, sliced
from .numerics import DTYPES, LOGITS, assert_attention, run_attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("case", CASES)
def test_is_as_good_as_the_reference(case, logits, dtype):
    case = CASES[case]
    qkv, d_out = draw(case, logits, dtype)
    assert_attention(
        case.bind(ops.hierarchical_attention),
        case.bind(reference.hierarchical_attention),
        qkv,
        d_out,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_and_gradients(dtype):
    case = CASES["ragged"]
    qkv = [sliced(case.shape, dtype) for _ in range(3)]
    d_out = sliced(case.shape, dtype)
    assert not d_out.is_contiguous()
    assert_attention(
        case.bind(ops.hierarchical_attention),
        case.bind(reference.hierarchical_attention),
        qkv,
        d_out,
    )


def test_head_first_storage_and_an_expanded_batch():
    case = CASES["ragged"]
    batch, length, heads, head_dim = case.shape
    q = torch.randn(batch, heads, length, head_dim).transpose(1, 2)
    k, v = (torch.randn(1, *case.shape[1:]).expand(case.shape) for _ in range(2))
    assert_attention(
        case.bind(ops.hierarchical_attention),
        case.bind(reference.hierarchical_attention),
        (q, k, v),
        torch.randn(case.shape),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expanded_output_gradient_equals_a_dense_one(dtype):
    qkv, _ = draw(SMALL, dtype=dtype)
    op = SMALL.bind(ops.hierarchical_attention)
    expanded = torch.randn(1, 1, 1, 1, dtype=dtype).expand(SMALL.shape)
    for a, b in zip(
        run_attention(op, qkv, expanded), run_attention(op, qkv, expanded.contiguous()), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rule", RULES)
def test_reference_agrees_with_flex_attention(rule, device):
    """A second oracle, from the text of the rule and without attention_mask."""
    case = Case(2, 2, 16, (2, 1, 1), 5, 6, {"rule": rule, "isolate_level": 1})
    q, k, v = (t.to(device) for t in draw(case)[0])
    num_txt, h, w = case.tree.num_tokens, case.h, case.w
    node = torch.zeros(case.shape[1], 3, dtype=torch.int64)
    node[:num_txt] = torch.tensor(
        [(n.level, n.row, n.col) for n in case.tree.nodes() for _ in range(n.start, n.stop)]
    )
    level, row, col = node.T.to(device)

    def touches(patch, level, row, col):
        y, x, cells = patch // w, patch % w, 2**level
        rows = (y * cells < (row + 1) * h) & ((y + 1) * cells > row * h)
        return rows & (x * cells < (col + 1) * w) & ((x + 1) * cells > col * w)

    def may_attend(_batch, _head, i, j):
        txt_i, txt_j = i < num_txt, j < num_txt
        sees_own = touches(i - num_txt, level[j], row[j], col[j])
        seen_by_own = touches(j - num_txt, level[i], row[i], col[i])
        up_i, up_j = (level[i] - level[j]).clamp_min(0), (level[j] - level[i]).clamp_min(0)
        line = (row[i] >> up_i == row[j] >> up_j) & (col[i] >> up_i == col[j] >> up_j)
        shares = torch.zeros_like(line)
        for node_row in range(2):
            for node_col in range(2):
                both = [touches(p - num_txt, 1, node_row, node_col) for p in (i, j)]
                shares = shares | (both[0] & both[1])
        img_img = shares if rule == "isolated" else torch.ones_like(shares)
        if rule == "overlap":
            line, seen_by_own = torch.ones_like(line), torch.ones_like(line)
        txt_row = torch.where(txt_j, line, seen_by_own)
        return torch.where(txt_i, txt_row, torch.where(txt_j, sees_own, img_img))

    length = case.shape[1]
    mask = create_block_mask(may_attend, None, None, length, length, device=str(device))
    out, lse = case.bind(reference.hierarchical_attention)(q, k, v)
    flex, aux = flex_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        block_mask=mask,
        return_aux=AuxRequest(lse=True),
    )
    torch.testing.assert_close(out, flex.transpose(1, 2))
    torch.testing.assert_close(lse, aux.lse)


@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_torch_attention_under_the_dense_mask(rule):
    tree, h, w = Hierarchy((2, 1, 1)), 6, 5
    q, k, v = torch.randn(3, 2, tree.num_tokens + 2 + h * w, 2, 16)
    out = ops.hierarchical_attention(q, k, v, tree, h, w, rule, 0.4, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=tree.attention_mask(h, w, rule, extra_text=2),
        scale=0.4,
    )
    torch.testing.assert_close(out, dense.transpose(1, 2))


def test_gradcheck():
    case = Case(1, 1, 16, (1, 1), 2, 3, {"rule": "local", "extra_text": 1})
    qkv = [torch.randn(case.shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *t: case.bind(ops.hierarchical_attention)(*t)[0], qkv, fast_mode=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_row_depends_on_the_keys_it_sees_and_on_no_other_bit(rule, dtype):
    case = CASES["ragged"]._replace(options={"rule": rule})
    (q, k, v), _ = draw(case, dtype=dtype)
    mask = case.tree.attention_mask(case.h, case.w, rule)
    op = case.bind(ops.hierarchical_attention)
    before = op(q, k, v)[0]
    for key in (case.tree.span("/3/0").start, case.shape[1] - 1):
        k2, v2 = k.clone(), v.clone()
        k2[:, key], v2[:, key] = torch.randn(2, *k[:, key].shape, dtype=torch.float32).to(dtype)
        same = op(q, k2, v2)[0].eq(before).flatten(2).all(-1)
        assert torch.equal(same, ~mask[:, key].expand_as(same))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_alone_equals_itself_in_a_batch(dtype):
    case = CASES["ragged"]
    qkv, d_out = draw(case, dtype=dtype)
    op = case.bind(ops.hierarchical_attention)
    alone = run_attention(op, [t[1:] for t in qkv], d_out[1:])
    for a, b in zip(alone, run_attention(op, qkv, d_out), strict=True):
        assert torch.equal(a, b[1:])


def test_twice_the_values_give_twice_the_output():
    (q, k, v), _ = draw(SMALL)
    op = SMALL.bind(ops.hierarchical_attention)
    assert torch.equal(op(q, k, 2 * v)[0], 2 * op(q, k, v)[0])


def test_the_largest_finite_inputs_give_no_infinity():
    (q, k, v), d_out = draw(SMALL, dtype=torch.float16)
    v = v.sign() * 60000
    got = run_attention(SMALL.bind(ops.hierarchical_attention), (q, k, v), d_out * 1e-4)
    assert all(t.isfinite().all() for t in got)


def test_lse_comes_on_request_and_has_no_gradient():
    (q, k, v), _ = draw(SMALL)
    q.requires_grad_()
    out, lse = SMALL.bind(ops.hierarchical_attention)(q, k, v)
    assert out.requires_grad
    assert not lse.requires_grad
    assert lse.is_contiguous()
    alone = ops.hierarchical_attention(q, k, v, SMALL.tree, SMALL.h, SMALL.w, "isolated")
    assert torch.equal(alone, out)


def test_a_second_derivative_is_refused():
    qkv, _ = draw(SMALL)
    qkv = [t.requires_grad_() for t in qkv]
    out, _ = SMALL.bind(ops.hierarchical_attention)(*qkv)
    (dq,) = torch.autograd.grad(out.square().sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="hierarchical_attention_backward"):
        torch.autograd.grad(dq.sum(), qkv[1])


@pytest.mark.parametrize("case", ["ragged", "extra-text-and-source"])
def test_opcheck(case):
    case = CASES[case]
    options = case.options
    layout = (
        list(case.tokens_per_node), case.h, case.w, options["rule"],
        options.get("extra_text", 0), options.get("isolate_level", 0),
        list(options.get("source", ())), 0.25, "auto", True,
    )  # fmt: skip
    (q, k, v), d_out = draw(case, dtype=torch.bfloat16)
    inputs = [t.requires_grad_() for t in (sliced(case.shape, torch.bfloat16), k, v)]
    torch.library.opcheck(torch.ops.sda_fast.hierarchical_attention.default, (*inputs, *layout))
    out, lse = torch.ops.sda_fast.hierarchical_attention(q, k, v, *layout)
    torch.library.opcheck(
        torch.ops.sda_fast.hierarchical_attention_backward.default,
        (d_out, q.detach(), k.detach(), v.detach(), out, lse, *layout),
        test_utils=("test_schema", "test_faketensor"),
    )


class JointAttention(torch.nn.Module):
    def __init__(self, tree: Hierarchy):
        super().__init__()
        self.tree = tree
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        out = ops.hierarchical_attention(q, k, v, self.tree, h, w, "local")
        return out.flatten(2)


def test_compiles_whole_and_for_other_sizes():
    tree = Hierarchy((2, 1))
    module = JointAttention(tree)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for h, w in ((3, 4), (5, 2), (2, 7)):
        x = torch.randn(2, tree.num_tokens + h * w, 32)
        grads = []
        for f in (module, compiled):
            out = f(x, h, w)
            grads.append(torch.autograd.grad(out.square().sum(), module.qkv.weight)[0])
        torch.testing.assert_close(*grads)


def test_compiles_for_other_levels_and_trees():
    compiled = torch.compile(ops.hierarchical_attention, fullgraph=True, backend="aot_eager")
    for tree in (Hierarchy((2, 1, 1)), Hierarchy((2, 1))):
        q, k, v = torch.randn(3, 1, tree.num_tokens + 6, 1, 16)
        for level in range(tree.num_levels - 1, -1, -1):
            args, level_only = (q, k, v, tree, 3, 2, "isolated"), {"isolate_level": level}
            expected = ops.hierarchical_attention(*args, **level_only)
            assert torch.equal(compiled(*args, **level_only), expected)


def test_recomputed_in_a_checkpoint_it_is_the_same():
    module, x = JointAttention(Hierarchy((2, 1))), torch.randn(2, 18, 32, requires_grad=True)
    plain = torch.autograd.grad(module(x, 3, 4).square().sum(), x)[0]
    again = checkpoint(module, x, 3, 4, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain)


def test_autocast_casts_as_torch_attention_does():
    (q, k, v), _ = draw(SMALL)
    op = SMALL.bind(ops.hierarchical_attention)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = op(q, k.bfloat16(), v.half())
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, op(q.bfloat16(), k.bfloat16(), v.half().bfloat16())[0])


def test_meta_tensors_only_infer():
    qkv = [torch.randn(SMALL.shape, device="meta", dtype=torch.float16) for _ in range(3)]
    out, lse = SMALL.bind(ops.hierarchical_attention)(*qkv)
    assert (out.shape, out.dtype, out.device.type) == (SMALL.shape, torch.float16, "meta")
    assert (lse.shape, lse.dtype) == ((1, 2, SMALL.shape[1]), torch.float32)


def test_the_mask_is_kept_and_their_number_is_bounded():
    _bias.cache_clear()
    (q, k, v), _ = draw(SMALL)
    for _ in range(3):
        SMALL.bind(ops.hierarchical_attention)(q, k, v)
    assert (_bias.cache_info().misses, _bias.cache_info().hits) == (1, 2)
    for w in range(1, 30):
        _bias(Layout((1, 1), 1, w, "overlap", 0, 1, ()), torch.float32)
    assert _bias.cache_info().currsize <= 4


def test_a_fake_cuda_tensor_only_infers():
    with FakeTensorMode():
        q, k, v = (torch.empty(SMALL.shape, device="cuda") for _ in range(3))
        out, lse = SMALL.bind(ops.hierarchical_attention)(q, k, v)
    assert (out.shape, out.device.type, lse.device.type) == (SMALL.shape, "cuda", "cuda")


def test_a_gpu_that_is_too_old_is_refused_with_every_other_reason(monkeypatch):
    with FakeTensorMode():
        q, k, v = (torch.empty(SMALL.shape, device="cuda") for _ in range(3))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        with pytest.raises(ValueError, match=r"capability 8\.0 or newer, got 7\.5") as error:
            ops.hierarchical_attention(q, k.half(), v, SMALL.tree, SMALL.h, SMALL.w + 1)
    for words in ("k must have the dtype of q", "q must have S = 50"):
        assert words in str(error.value)


BAD = [
    ({"k": lambda t: t.half()}, r"k must have the dtype of q, torch.float32, got torch.float16"),
    ({"v": lambda t: t.to("meta")}, "v must be on the device of q, cpu, got meta"),
    ({"q": lambda t: t[0]}, r"q must be \[B, S, H, D\], got shape \(43, 2, 16\)"),
    ({"q": lambda t: t.int()}, "q must be bfloat16, float16, float32 or float64, got torch.int32"),
    ({"q": lambda t: t.mT.contiguous().mT}, "q must have a last stride of 1"),
    ({"v": lambda t: t[:, :, :1]}, "v must have the shape of k"),
    ({"k": lambda t: t[..., :8], "v": lambda t: t[..., :8]}, "k must have B, H, D of q"),
    (
        {"q": lambda t: t[:, :-1]},
        "q must have S = 43: positions, .* got S = 42",
    ),
    ({n: lambda t: t[:0] for n in "qkv"}, "q must not be empty"),
    ({"tree": lambda _: (2, 1, 1)}, "tree must be a Hierarchy, got tuple"),
    ({"h": lambda _: 0}, "h must be an integer >= 1, got 0"),
    ({"w": lambda _: 3.0}, r"w must be an integer >= 1, got 3\.0"),
    ({"extra_text": lambda _: -1}, "extra_text must be an integer >= 0, got -1"),
    (
        {"rule": lambda _: "all"},
        "rule must be one of overlap, local, isolated, got 'all'",
    ),
    (
        {"isolate_level": lambda _: 3},
        "isolate_level must be .* levels 0 to 2, got 3",
    ),
    ({"isolate_level": lambda _: True}, "isolate_level must be .* got True"),
    ({"source": lambda _: (3, 0)}, r"source must be \(rows, columns\), .* got \(3, 0\)"),
    ({"source": lambda _: 4}, r"source must be \(rows, columns\), .* got 4"),
    ({"scale": lambda _: 0.0}, r"scale must be a positive finite number, got 0\.0"),
    ({"scale": lambda _: float("inf")}, "scale must be a positive finite number, got inf"),
    ({"implementation": lambda _: "fast"}, "implementation must be one of auto, .* got 'fast'"),
    ({"implementation": lambda _: "fused"}, "q must be on a CUDA device for the kernels, got cpu"),
    ({"out": lambda _: torch.zeros(1, 2)}, r"out must be like q .* got \(\(1, 2\)"),
    (
        {"out": lambda _: torch.zeros(1).expand(SMALL.shape)},
        "out must have a last stride of 1 and no other below D",
    ),
    (
        {"out": lambda _: torch.zeros(9999).as_strided(SMALL.shape, (0, 8, 16, 1))},
        "out must have a last stride of 1 and no other below D",
    ),
    ({"scale": lambda _: 1e39}, "scale must be a positive finite number, got 1e"),
    (
        {"q": lambda t: t.requires_grad_(), "out": lambda _: torch.zeros(SMALL.shape)},
        "out has no backward",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refuses(change, message):
    good = dict(zip("qkv", draw(SMALL)[0], strict=True))
    good |= {"tree": SMALL.tree, "h": SMALL.h, "w": SMALL.w, "extra_text": 0, "rule": "local"}
    ops.hierarchical_attention(**good)
    bad = good | {name: f(good.get(name)) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        ops.hierarchical_attention(**bad)


def test_one_message_lists_every_reason():
    q, k, v = draw(SMALL)[0]
    with pytest.raises(ValueError, match="k must have the dtype") as error:
        SMALL.bind(ops.hierarchical_attention)(q[:, 1:], k[:, 2:].half(), v[:, 2:])
    for words in ("q must have S = 43", "got S = 42", "k must have S = 43", "got S = 41"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="hierarchical_attention: ") as error:
        ops.hierarchical_attention(q, k.half(), v, SMALL.tree, 0, 3, "all", extra_text=-2)
    for words in ("k must have the dtype", "h must", "rule must", "extra_text must"):
        assert words in str(error.value)
