"""Runs on pictures with tiny random frozen models: a few steps of a few pictures."""

from train.__main__ import build_stage
from train.config import override
from train.ranks import Ranks
from train.recipes import RECIPES
from train.state import State

TINY = [
    "rehearsal=small", "resolution=32", "steps=3", "batch_size=4", "micro_batch=2", "workers=0",
    "precision=fp32", "warmup_steps=1", "log_every=1", "eval_every=3", "eval_pictures=4",
    "checkpoint_every=2", "level_dropout=0", "tokens_per_node=4,2", "adamw_lr=1e-3",
]  # fmt: skip


def tiny(out_dir, data, *more):
    return override(RECIPES["rehearse"](), [*TINY, f"data={data}", f"out_dir={out_dir}", *more])


def build(config):
    return build_stage(config, Ranks())


def gradient(stage, batches):
    """Mean losses of the batches, and the gradient of all that learns."""
    state = State(stage.config, stage, Ranks())
    losses, _ = state.backward(batches)
    grads = {name: p.grad.clone() for name, p in stage.trained.named_parameters()}
    state.forget()
    return losses, grads
