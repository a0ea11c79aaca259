"""What adapter and editors are trained on, and whether positions collapse: pure functions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BASE_SEQ_LEN, BASE_SHIFT = 256, 0.5
MAX_SEQ_LEN, MAX_SHIFT = 4096, 1.15


def flow_matching_loss(
    velocity_fn: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the predicted velocity along the straight path to noise.

        x_t = (1 - t) x0 + t noise,    loss = mean |velocity_fn(x_t, t) - (noise - x0)|^2

    Rectified flow: Liu et al. 2022, https://arxiv.org/abs/2209.03003; in the form FLUX uses, Esser
    et al. 2024, https://arxiv.org/abs/2403.03206, section 2.

    Args:
        velocity_fn: (x_t like x0, t [B]) -> predicted velocity, shaped as x0.
        x0: [B, ...] clean latents, any float dtype.
        t: [B] in [0, 1], 1 = noise.
        noise: as x0, standard normal.

    Returns:
        Scalar f32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise must be shaped as x0, {tuple(x0.shape)}, got {tuple(noise.shape)}")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t must be [{x0.shape[0]}], one for each sample, got {tuple(t.shape)}")
    x0_f, noise_f = x0.float(), noise.float()
    t_f = t.float().view(-1, *(1,) * (x0.ndim - 1))
    velocity = velocity_fn(((1 - t_f) * x0_f + t_f * noise_f).to(x0.dtype), t)
    if velocity.shape != x0.shape:
        raise ValueError(
            f"velocity_fn must return the shape of x0, {tuple(x0.shape)}, "
            f"got {tuple(velocity.shape)}"
        )
    return F.mse_loss(velocity.float(), noise_f - x0_f)


def edit_loss(predicted: Tensor, target: Tensor, where: Tensor | None = None) -> Tensor:
    """How far an editor's positions are from those of the target picture, in length and direction.

        0.5 mean |predicted - target|^2 + 0.5 mean (1 - cos(predicted, target))

    The first mean is over positions and channels, the second over positions; each sample has its
    own first, and weighs the same however many of its positions count. Design: section 3.6. A zero
    vector has cosine 0 with everything.

    Args:
        predicted: [B, N, C], any float dtype.
        target: as predicted.
        where: bool [B, N], positions that count; None: all do. A sample without any gives 0.

    Returns:
        Scalar f32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if predicted.ndim != 3 or predicted.shape != target.shape:
        raise ValueError(
            f"predicted and target must be [B, N, C] of one shape, got {tuple(predicted.shape)} "
            f"and {tuple(target.shape)}"
        )
    if where is not None and where.shape != predicted.shape[:2]:
        raise ValueError(
            f"where must be {tuple(predicted.shape[:2])}, one for each position, "
            f"got {tuple(where.shape)}"
        )
    ours, theirs = predicted.float(), target.float()
    squared = (ours - theirs).square().mean(-1)
    error = 0.5 * squared + 0.5 * (1 - F.cosine_similarity(ours, theirs, dim=-1))
    if where is None:
        return error.mean()
    counted = torch.where(where, error, 0.0).sum(1) / where.sum(1).clamp_min(1)
    return counted.mean()


def cosine_penalty(tokens: Tensor) -> Tensor:
    """Mean squared cosine between different positions of a sample; keeps them from agreeing.

        1 / (B N (N - 1)) * sum_b sum_{i != j} cos(e_i, e_j)^2

    Design: an orthogonality penalty, Bansal et al. 2018, https://arxiv.org/abs/1810.09102, on unit
    vectors. A zero vector has cosine 0 with everything.

    Args:
        tokens: [B, N, C], any float dtype.

    Returns:
        Scalar f32 in [0, 1]; 0 where N is 1.

    Raises:
        ValueError: tokens is not [B, N, C].
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be [B, N, C], got shape {tuple(tokens.shape)}")
    batch, count, _ = tokens.shape
    # a bf16 Gram matrix rounds small cosines away, so autocast must not reach it
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float(), dim=-1)
        cosines = unit @ unit.mT
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=tokens.device)
    return (cosines.square() * off_diagonal).sum() / max(1, batch * count * (count - 1))


def mean_cosine(tokens: Tensor) -> Tensor:
    """Mean cosine between different positions of a sample: 1 when all have become one.

    Args:
        tokens: [B, N, C], any float dtype.

    Returns:
        Scalar f32; 0 where N is 1.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    batch, count, _ = unit.shape
    # the sum over all pairs, less those of a position with itself
    every = unit.sum(1).square().sum() - unit.square().sum()
    return every / max(1, batch * count * (count - 1))


def effective_rank(tokens: Tensor) -> Tensor:
    """Over how many directions the positions of a sample spread: 1 to min(N, C), mean over samples.

        exp(-sum p log p),    p = singular values / their sum

    Roy and Vetterli 2007, https://ieeexplore.ieee.org/document/7098875.

    Args:
        tokens: [B, N, C], any float dtype, finite.

    Returns:
        Scalar f32.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        values = torch.linalg.svdvals(tokens.float())
    p = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(p).sum(-1).exp().mean()


def resolution_shift(seq_len: int) -> float:
    """mu of FLUX's timestep shift: linear in the number of image tokens, 0.5 at 256, 1.15 at 4096.

    As ``calculate_shift`` of diffusers' Flux pipelines; sequences outside that range extrapolate.
    """
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_SEQ_LEN - BASE_SEQ_LEN)
    return BASE_SHIFT + slope * (seq_len - BASE_SEQ_LEN)


def sample_t(
    batch: int,
    seq_len: int,
    generator: torch.Generator | None = None,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Draw times from a logit-normal, shifted towards noise as FLUX shifts them.

        t = sigmoid(mean + std z + mu(seq_len)),    z ~ N(0, 1)

    The shift e^mu / (e^mu + 1/t - 1) adds mu to the logit of t. Esser et al. 2024,
    https://arxiv.org/abs/2403.03206, sections 3.1 and 5.3.2; mu as in ``resolution_shift``.

    Args:
        batch: how many.
        seq_len: image tokens of a sample, after packing.
        generator: source of z; its device is that of the result. None is the global CPU generator.
        mean: of the logit before the shift.
        std: likewise, > 0.

    Returns:
        [batch] f32 in (0, 1).

    Raises:
        ValueError: batch or seq_len is below 1, or std is not positive.
    """
    if batch < 1 or seq_len < 1:
        raise ValueError(f"batch and seq_len must be at least 1, got {batch} and {seq_len}")
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    device = "cpu" if generator is None else generator.device
    z = torch.randn(batch, generator=generator, device=device)
    return torch.sigmoid(mean + std * z + resolution_shift(seq_len))
