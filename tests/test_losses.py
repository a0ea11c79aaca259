import math

import pytest
import torch

from sda_fast.losses import (
    cosine_penalty,
    edit_loss,
    flow_matching_loss,
    resolution_shift,
    sample_t,
)


def test_flow_matching_loss_is_zero_for_the_true_velocity_and_follows_the_path():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 5, 4, generator=generator)
    t = torch.tensor([0.0, 0.25, 1.0])

    def velocity(x_t, t_given):
        assert torch.equal(t_given, t)
        torch.testing.assert_close(x_t[0], x0[0])
        torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])
        torch.testing.assert_close(x_t[2], noise[2])
        return noise - x0

    assert flow_matching_loss(velocity, x0, t, noise) == 0


def test_flow_matching_loss_is_the_mean_square_and_reaches_the_model():
    x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
    weight = torch.tensor(4.0, requires_grad=True)
    loss = flow_matching_loss(lambda x, t: weight * torch.ones_like(x), x0, torch.rand(2), noise)
    loss.backward()
    assert loss == 9
    assert weight.grad == 6


def test_flow_matching_loss_is_taken_in_float32():
    x0 = torch.zeros(4, 1000, dtype=torch.bfloat16)
    loss = flow_matching_loss(lambda x, t: torch.full_like(x, 0.01), x0, torch.zeros(4), x0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), float(torch.tensor(0.01).bfloat16()) ** 2)


def test_cosine_penalty_agrees_with_the_double_loop():
    tokens = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    wanted = [
        torch.cosine_similarity(sample[i], sample[j], dim=0) ** 2
        for sample in tokens
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    torch.testing.assert_close(cosine_penalty(tokens), torch.stack(wanted).mean())
    torch.testing.assert_close(cosine_penalty(-30 * tokens), cosine_penalty(tokens))


def test_cosine_penalty_at_its_ends():
    assert cosine_penalty(torch.eye(6)[None]) == 0
    torch.testing.assert_close(cosine_penalty(torch.ones(2, 4, 3)).item(), 1.0)
    assert cosine_penalty(torch.ones(2, 1, 3)) == 0


def test_cosine_penalty_ignores_autocast_and_survives_a_zero_vector():
    tokens = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    tokens[0, 2] = 0
    tokens.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = cosine_penalty(tokens)
    assert torch.equal(inside, cosine_penalty(tokens))
    inside.backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


def test_resolution_shift_is_that_of_diffusers():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for seq_len in (64, 256, 1024, 4096, 16384):
        assert resolution_shift(seq_len) == pytest.approx(calculate_shift(seq_len))


@pytest.mark.parametrize("seq_len", [64, 1024, 4096])
def test_sample_t_is_the_shifted_logit_normal(seq_len):
    t = sample_t(20_000, seq_len, torch.Generator().manual_seed(0), mean=0.3, std=0.8)
    assert t.min() > 0
    assert t.max() < 1
    logit = torch.logit(t.double())
    assert logit.mean().item() == pytest.approx(0.3 + resolution_shift(seq_len), abs=0.03)
    assert logit.std().item() == pytest.approx(0.8, abs=0.03)


def test_sample_t_shifts_a_draw_as_the_scheduler_does():
    z = torch.randn(8, generator=torch.Generator().manual_seed(5))
    plain, mu = torch.sigmoid(z), resolution_shift(1024)
    shifted = math.exp(mu) / (math.exp(mu) + (1 / plain - 1))
    drawn = sample_t(8, 1024, torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn, shifted)


def test_losses_name_what_does_not_fit():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"noise must be shaped as x0, \(2, 3\), got \(2, 4\)"):
        flow_matching_loss(lambda x, t: x, x, torch.zeros(2), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"t must be \[2\]"):
        flow_matching_loss(lambda x, t: x, x, torch.zeros(2, 1), x)
    with pytest.raises(ValueError, match="velocity_fn must return"):
        flow_matching_loss(lambda x, t: x[:1], x, torch.zeros(2), x)
    with pytest.raises(ValueError, match=r"tokens must be \[B, N, C\]"):
        cosine_penalty(x)
    with pytest.raises(ValueError, match="batch and seq_len"):
        sample_t(0, 64)
    with pytest.raises(ValueError, match="std must be positive"):
        sample_t(1, 64, std=0.0)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_edit_loss_agrees_with_its_formula_and_is_zero_at_the_target():
    predicted, target = drawn(2, 3, 5, 7)
    wanted = []
    for ours, theirs in zip(predicted.double(), target.double(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            cosine = a @ b / (a.norm() * b.norm())
            wanted.append(0.5 * ((a - b) ** 2).mean() + 0.5 * (1 - cosine))
    torch.testing.assert_close(edit_loss(predicted, target).double(), torch.stack(wanted).mean())
    torch.testing.assert_close(edit_loss(target, target).item(), 0.0, atol=1e-6, rtol=0)
    # length and direction both count
    power = target.square().mean().item()
    for scale, cosine in ((2, 1), (0, 0), (-1, -1)):
        found = edit_loss(scale * target, target).item()
        assert found == pytest.approx(0.5 * (scale - 1) ** 2 * power + 0.5 * (1 - cosine), rel=1e-5)


def test_edit_loss_of_some_positions_is_that_of_each_sample_alone():
    predicted, target = drawn(2, 3, 5, 7)
    where = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    alone = [
        edit_loss(predicted[i : i + 1, where[i]], target[i : i + 1, where[i]]) for i in range(2)
    ]
    torch.testing.assert_close(edit_loss(predicted, target, where), sum(alone) / 3)
    leaf = predicted.clone().requires_grad_()
    edit_loss(leaf, target, where).backward()
    assert torch.equal(leaf.grad.any(-1), where)


def test_edit_loss_is_taken_in_float32():
    predicted, target = drawn(2, 3, 5, 64).bfloat16()
    loss = edit_loss(predicted, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, edit_loss(predicted.float(), target.float()))


@pytest.mark.parametrize(
    ("predicted", "target", "where", "message"),
    [
        ((2, 3, 4), (2, 3, 5), None, r"predicted and target must be .* got \(2, 3, 4\)"),
        ((2, 3), (2, 3), None, r"must be \[B, N, C\] of one shape, got \(2, 3\)"),
        ((2, 3, 4), (2, 3, 4), (2, 4), r"where must be \(2, 3\).* got \(2, 4\)"),
    ],
)
def test_edit_loss_refuses(predicted, target, where, message):
    where = None if where is None else torch.ones(where, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        edit_loss(torch.zeros(predicted), torch.zeros(target), where)
