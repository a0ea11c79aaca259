"""The kernels of joint attention against the reference, on the GPU or in Triton's interpreter."""

import pytest
import torch

from sda_fast.hierarchy import RULES

from .attention_cases import CASES, SMALL, Case, draw, sliced
from .joint_tiles import check, implementations, on
from .numerics import DTYPES, LOGITS

pytestmark = pytest.mark.usefixtures("kernels")

OTHERS = [
    (name, implementation)
    for name in ("two-patches", "empty-level", "isolated", "extra-text-and-source")
    for implementation in implementations(CASES[name].options["rule"])
]


# each implementation meets each dtype and all logits
@pytest.mark.parametrize(
    ("implementation", "logits", "dtype"),
    [
        (("fused", "split")[(i + j) % 2], logits, dtype)
        for i, logits in enumerate(LOGITS)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_is_as_good_as_the_reference(implementation, logits, dtype, tiles, device):
    case = CASES["ragged"]._replace(heads=1)
    qkv, d_out = draw(case, logits, dtype)
    check(case, implementation, on(device, qkv), d_out.to(device))


# each sequence meets each dtype, in either implementation
@pytest.mark.parametrize(
    ("name", "implementation", "logits", "dtype"),
    [
        (name, implementation, LOGITS[(i + j) % 4], dtype)
        for i, (name, implementation) in enumerate(OTHERS)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_other_sequences_too(name, implementation, logits, dtype, tiles, device):
    case = CASES[name]
    qkv, d_out = draw(case, logits, dtype)
    check(case, implementation, on(device, qkv), d_out.to(device))


TREES = [(3, 2, 1), (4, 0, 1), (0, 0, 1, 1), (16,), (2, 1, 1, 0, 0), (3, 1, 0, 0, 0, 0), (7, 3)]


def random_case(seed: int) -> Case:
    """One to six levels, odd counts, empty levels, straddling grids, all rules and options."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (), generator=g))]
    tokens = pick(*TREES)
    options = {
        "rule": RULES[seed % 3],
        "extra_text": pick(0, 0, 1, 5),
        "isolate_level": pick(*range(len(tokens))),
        "source": pick(None, None, (3, 2), (1, 7)),
        "scale": pick(None, 0.3),
    }
    return Case(
        *pick((1, 1), (2, 1), (1, 2)), pick(16, 32), tokens,
        pick(1, 3, 5, 8), pick(1, 2, 7), options,
    )  # fmt: skip


# each rule meets each size of tiles and each dtype
@pytest.mark.parametrize(
    ("seed", "tiles", "dtype"),
    [
        (seed, ("small", "one", "middle")[seed // 3 % 3], DTYPES[(seed + seed // 3) % 3])
        for seed in range(18)
    ],
    indirect=["tiles"],
)
def test_random_trees_grids_and_rules(seed, tiles, dtype, device):
    case = random_case(seed)
    for implementation in implementations(case.options["rule"]):
        qkv, d_out = draw(case, LOGITS[seed % 4], dtype)
        check(case, implementation, on(device, qkv), d_out.to(device))


@pytest.mark.parametrize(
    ("implementation", "head_dim", "dtype"),
    [
        ("fused", 64, torch.bfloat16),
        ("fused", 128, torch.float16),
        ("split", 64, torch.float16),
        ("split", 128, torch.bfloat16),
    ],
)
def test_wide_heads_with_the_tiles_of_the_table(implementation, head_dim, dtype, device):
    case = Case(1, 1, head_dim, (8, 2), 15, 18, {"rule": "overlap"})
    qkv, d_out = draw(case, 1.0, dtype)
    check(case, implementation, on(device, qkv), d_out.to(device))


def test_float32_with_the_tiles_of_the_table(device):
    qkv, d_out = draw(SMALL)
    check(SMALL, "fused", on(device, qkv), d_out.to(device))


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_strided_inputs_and_gradients(implementation, tiles, device):
    case = CASES["ragged"]._replace(heads=2)
    qkv = [sliced(case.shape, torch.bfloat16).to(device) for _ in range(3)]
    d_out = sliced(case.shape, torch.bfloat16).to(device)
    assert not d_out.is_contiguous()
    check(case, implementation, qkv, d_out)


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_an_expanded_output_gradient_and_head_first_storage(implementation, tiles, device):
    case = CASES["ragged"]._replace(heads=2)
    batch, length, heads, head_dim = case.shape
    q = torch.randn(batch, heads, length, head_dim, dtype=torch.float16).transpose(1, 2)
    k, v = (torch.randn(1, *case.shape[1:], dtype=torch.float16) for _ in range(2))
    qkv = on(device, (q, k.expand(case.shape), v.expand(case.shape)))
    d_out = torch.randn(1, 1, 1, 1, dtype=torch.float16).expand(case.shape).to(device)
    check(case, implementation, qkv, d_out)


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_storage_that_ends_in_nan(implementation, tiles, device):
    """What lies behind the last token is neither read nor written."""
    case = CASES["ragged"]._replace(heads=2)
    batch, length, heads, head_dim = case.shape
    qkv, d_out = [], None
    for _ in range(4):
        wide = torch.full((batch, length + 40, heads, head_dim), float("nan"), dtype=torch.bfloat16)
        wide[:, :length] = torch.randn(case.shape)
        qkv.append(wide.to(device)[:, :length])
    *qkv, d_out = qkv
    check(case, implementation, qkv, d_out)
