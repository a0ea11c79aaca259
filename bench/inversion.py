"""Prompt inversion: the embedding that suits one picture best, found through the decoder itself.

Each picture's positions are free parameters, fitted to that picture alone: no encoder stands in the
way. It tells what the frozen decoder could rebuild, at hundreds of times the cost.
"""

import math
import warnings
from collections.abc import Callable

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sda_fast.embedding import SemanticEmbedding
from sda_fast.flux_latents import latents_of, pack
from sda_fast.pipeline import SemanticPipeline

LEARNING_RATE = 0.3
"""In units of the start's RMS; falls to zero along a half cosine. 0.05 leaves shapes unfinished."""
DRAWS = 4
"""Times t, and noises, for each picture at each step."""


def invert(
    pipe: SemanticPipeline,
    pictures: Tensor,
    start: SemanticEmbedding,
    steps: int = 400,
    on_step: Callable[[], None] = lambda: None,
) -> SemanticEmbedding:
    """Fit an embedding to each picture by the loss the adapter was trained with.

    Rectified flow, x_t = (1 - t) x0 + t n with target n - x0, under the overlap mask; Adam on the
    positions, everything else frozen. After textual inversion, Gal et al. 2022,
    https://arxiv.org/abs/2208.01618.

    Args:
        pipe: its Flux pipeline is the decoder, and stays as it is.
        pictures: [B, 3, H, W] in [0, 1].
        start: [B, N, C], with its pooled vector.
        steps: of the optimizer.
        on_step: called after each.

    Returns:
        [B, N, C], of the tree of start.

    Raises:
        ValueError: there are not as many pictures as embeddings, or steps is below 1.
    """
    if pictures.ndim != 4 or len(pictures) != len(start) or steps < 1:
        raise ValueError(
            f"pictures must be [{len(start)}, 3, H, W] and steps at least 1, "
            f"got {list(pictures.shape)} and {steps}"
        )
    x0 = pack(latents_of(pipe.flux.vae, pictures)).repeat_interleave(DRAWS, dim=0)
    velocity = _decoder(pipe, start, *pictures.shape[2:])
    tokens = start.tokens.detach().clone().requires_grad_()
    rate = LEARNING_RATE * start.tokens.square().mean().sqrt().item()
    optimizer = torch.optim.Adam([tokens], rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        t = _times(len(x0), x0.shape[1], generator)
        noise = torch.randn(x0.shape, generator=generator)
        predicted = velocity(torch.lerp(x0, noise, t[:, None, None]), t, tokens)
        loss = F.mse_loss(predicted.float(), noise - x0)
        (tokens.grad,) = torch.autograd.grad(loss, tokens)
        optimizer.step()
        schedule.step()
        on_step()
    return SemanticEmbedding(tokens.detach(), start.tree, start.pooled)


def _decoder(
    pipe: SemanticPipeline, start: SemanticEmbedding, height: int, width: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x_t [B * DRAWS, S_img, C], t [B * DRAWS], tokens [B, N, C]) -> velocity like x_t."""
    flux, patch = pipe.flux, pipe.patch
    fixed = start.flux_inputs(height, width, patch=patch)
    pooled = fixed["pooled_prompt_embeds"].repeat_interleave(DRAWS, dim=0)
    grid = height // patch, width // patch
    img_ids = flux._prepare_latent_image_ids(1, *grid, pooled.device, pooled.dtype)
    txt_ids = torch.zeros(start.tree.num_tokens, 3)

    def velocity(x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        # the CPU flash kernel's backward costs six times that of plain matrix products here
        plain = sdpa_kernel(SDPBackend.MATH)
        with plain, torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            # diffusers' RMSNorm keeps f32 weights under autocast, at no harm
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            return flux.transformer(
                hidden_states=x_t,
                encoder_hidden_states=tokens.repeat_interleave(DRAWS, dim=0),
                pooled_projections=pooled,
                timestep=t,
                img_ids=img_ids,
                txt_ids=txt_ids,
                joint_attention_kwargs=fixed["joint_attention_kwargs"],
                return_dict=False,
            )[0]

    return velocity


def _times(batch: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """Logit-normal with FLUX's shift; DRAWS in a row are stratified, one from each quantile."""
    stratum = torch.arange(batch) % DRAWS
    quantile = (stratum + torch.rand(batch, generator=generator)) / DRAWS
    normal = math.sqrt(2) * torch.erfinv((2 * quantile - 1).clamp(-0.9999, 0.9999))
    return torch.sigmoid(normal + calculate_shift(seq_len))
