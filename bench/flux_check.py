"""Is a FLUX step right? Asked before it is timed, against diffusers' own forward at full depth.

What is exact is that forward in float32 (float64 for float32 weights). Twice the weights would not
fit beside them, so that each block is cast when it runs and dropped after; in the backward it runs
once more. A result may be as far from that as the same forward in the weights' own dtype, and by a
ratio further.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.flux_cases import STEPS, FluxCase
from bench.flux_levers import plain_norm_rope
from bench.flux_model import Frozen, run_stock
from sda_fast.reference.norm_rope import norm_rope as in_torch

EXACT = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
RATIO = {"d_positions": 2.0}
"""Of the norm of the error over that of the stock forward's; 1.25 for outputs."""
OUTPUT_RATIO = 1.25
WORST = 2.0
"""The same ratio for the worst row, as of one token."""
CHECKED_STEPS = 2
"""Of a whole loop, as float32 takes seconds for each; the latents of its end must be finite."""
LOSSY = 0.2
"""Norm of the error over that of the result, of what is quantised. Rows in e4m3 put a narrow FLUX
of full depth off by 0.09; a mask that is not obeyed, by 0.3."""


@dataclass(frozen=True, slots=True)
class FluxYardstick:
    """What is exact, and how far from it a result may be.

    Attributes:
        names: of the results.
        exact: those of the distinct pictures, [n, ..., C].
        limit: largest norm of the error of each, for one round of the distinct pictures.
        worst: largest norm of the error of a row.
    """

    names: tuple[str, ...]
    exact: tuple[Tensor, ...]
    limit: tuple[float, ...]
    worst: tuple[float, ...]

    def rounds(self, number: int, result: Tensor) -> tuple[Tensor, ...]:
        """Errors of the distinct pictures, for each time that they come."""
        exact = self.exact[number]
        return tuple(part.to(exact.dtype) - exact for part in result.split(len(exact)))

    def error(self, results: Sequence[Tensor]) -> float:
        """Largest norm of an error over the norm of what is exact, NaN if there is one."""
        ratios = [
            part.norm() / self.exact[i].norm()
            for i, result in enumerate(results)
            for part in self.rounds(i, result)
        ]
        return torch.stack(ratios).max().item()

    def faults(self, results: Sequence[Tensor]) -> list[str]:
        """What is wrong with the results; empty if nothing is."""
        found = []
        for i, (name, result) in enumerate(zip(self.names, results, strict=True)):
            exact = self.exact[i]
            if result.shape[1:] != exact.shape[1:] or len(result) % len(exact):
                found.append(f"{name} is {list(result.shape)}, not n * {list(exact.shape)}")
                continue
            parts = self.rounds(i, result)
            error = torch.stack([part.norm() for part in parts]).max().item()
            row = torch.stack([part.norm(dim=-1).max() for part in parts]).max().item()
            if not error <= self.limit[i]:  # NaN is not
                found.append(f"{name} is off by {error:.2e} in norm, allowed {self.limit[i]:.2e}")
            elif not row <= self.worst[i]:
                found.append(f"a row of {name} is off by {row:.2e}, allowed {self.worst[i]:.2e}")
        return found


@dataclass(frozen=True, slots=True)
class Launches:
    """A yardstick for launches of the same.

    Attributes:
        each: for the results of one.
    """

    each: FluxYardstick

    def error(self, results: Sequence[Tensor]) -> float:
        """The largest one."""
        errors = torch.tensor([self.each.error(part) for part in self._parts(results)])
        return errors.max().item()

    def faults(self, results: Sequence[Tensor]) -> list[str]:
        """Of all, each once."""
        found = [fault for part in self._parts(results) for fault in self.each.faults(part)]
        return list(dict.fromkeys(found))

    def _parts(self, results: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        n = len(self.each.names)
        return [results[i : i + n] for i in range(0, len(results), n)]


@dataclass(frozen=True, slots=True)
class Noted:
    """A yardstick for one variant, which notes how far off that was.

    Attributes:
        yardstick: whose.
        notes: where the error goes to, under "error".
        lossy: held to LOSSY instead.
        unchecked: so many last results need only be finite.
    """

    yardstick: FluxYardstick | Launches
    notes: dict[str, Any] = field(default_factory=dict)
    lossy: bool = False
    unchecked: int = 0

    def faults(self, results: Sequence[Tensor]) -> list[str]:
        """See Ruler."""
        known = len(results) - self.unchecked
        if not all(result.isfinite().all() for result in results[known:]):
            return ["the last result is not finite"]
        results = results[:known]
        faults = self.yardstick.faults(results)
        if any(" is [" in fault for fault in faults):
            return faults
        error = self.yardstick.error(results)
        self.notes["error"] = error if error == error else None
        if not self.lossy:
            return faults
        return [] if error <= LOSSY else [f"it is off by {error:.2e} of its norm, allowed {LOSSY}"]


def make_yardstick(
    names: Sequence[str], exact: Sequence[Tensor], stock: Sequence[Tensor]
) -> FluxYardstick:
    """From what is exact and what the stock forward makes of it in the dtype that is used."""
    limit, worst = [], []
    for name, x, own in zip(names, exact, stock, strict=True):
        eps = torch.finfo(own.dtype).eps / 2  # one rounding
        off = own.to(x.dtype) - x
        limit.append(RATIO.get(name, OUTPUT_RATIO) * off.norm().item() + eps * x.norm().item())
        rows = off.norm(dim=-1).max().item(), x.norm(dim=-1).max().item()
        worst.append(WORST * rows[0] + eps * rows[1])
    return FluxYardstick(tuple(names), tuple(exact), tuple(limit), tuple(worst))


class Cast(nn.Module):
    """A module in another dtype, which it has only while it runs.

    Args:
        module: whose weights are left as they are.
        dtype: to compute in.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's."""
        if not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        # nothing is drawn
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(self._run, *args, **options, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(self.module).to(self.dtype)(*args, **kwargs)


def streamed(twin: Any, dtype: torch.dtype) -> Any:
    """A transformer that computes in another dtype, block by block; the twin, changed."""
    for name, child in list(twin.named_children()):
        if isinstance(child, nn.ModuleList):
            for i, block in enumerate(child):
                child[i] = Cast(block, dtype)
        elif name != "pos_embed":
            setattr(twin, name, Cast(child, dtype))
    return twin


def as_dtype(inputs: Mapping[str, Tensor], dtype: torch.dtype, distinct: int) -> dict[str, Tensor]:
    """The distinct pictures in another dtype; times as the own dtype rounds them."""
    own = inputs["hidden_states"].dtype
    cast = {}
    for name, t in inputs.items():
        if name.endswith("_ids"):
            cast[name] = t
        elif name in ("timestep", "guidance"):
            cast[name] = _rounded(t[:distinct], own, dtype)
        else:
            cast[name] = t[:distinct].to(dtype)
    return cast


def _rounded(time: Tensor, own: torch.dtype, dtype: torch.dtype) -> Tensor:
    """As FLUX rounds it before and after it takes it times 1000: part of the input, no error."""
    return (time.to(own) * 1000).to(dtype) / 1000


Results = tuple[Tensor, ...]
Compute = Callable[[Any, dict[str, Tensor]], Results]
"""A transformer and its inputs -> results."""


def rope_yardstick(layer: Mapping[str, Any]) -> Launches:
    """For norm and rotation of q and k: float64, and plain torch in the dtype of the streams.

    Args:
        layer: arguments of ``sda_fast.ops.norm_rope``.
    """
    stock = [t for t in plain_norm_rope(**layer) if t is not None]
    wide: dict[str, Any] = {
        "streams": [x.double() for x in layer["streams"]],
        "norms": [tuple(w.double() for w in pair) for pair in layer["norms"]],
    }
    exact = [t for t in in_torch(**(dict(layer) | wide)) if t is not None]
    return Launches(make_yardstick(("q", "k", "v")[: len(exact)], exact, stock))


def flux_yardstick(
    frozen: Frozen, case: FluxCase, inputs: Mapping[str, Tensor], names: Sequence[str],
    compute: Compute,
) -> FluxYardstick:  # fmt: skip
    """Work out what is exact, and how close is close enough.

    Args:
        frozen: the transformer.
        case: of its inputs.
        inputs: of its forward.
        names: of the results.
        compute: what is measured, by a stock transformer.
    """
    own = inputs["hidden_states"].dtype
    both = []
    for dtype in (EXACT[own], own):
        twin = streamed(frozen.twin(), dtype)
        both.append(compute(twin, as_dtype(inputs, dtype, case.distinct)))
    return make_yardstick(names, *both)


def one_step(mask: Tensor | None) -> Compute:
    """The velocity of a step."""

    def compute(transformer: Any, inputs: dict[str, Tensor]) -> Results:
        with torch.no_grad():
            return (run_stock(transformer, inputs, mask),)

    return compute


def euler(
    velocity: Callable[[int, Tensor], Tensor], latents: Tensor, steps: int, checked: int
) -> Results:
    """The latents after so many steps, and after all of them; or after the former alone.

    Args:
        velocity: number of the step, latents -> velocity, at time 1 - number / STEPS.
        latents: of time 1.
        steps: that are done, at most STEPS.
        checked: of these, those after which the first result is taken.
    """
    early, x = latents, latents
    wide = torch.promote_types(x.dtype, torch.float32)
    for i in range(steps):
        x = (x.to(wide) - velocity(i, x).to(wide) / STEPS).to(x.dtype)
        early = x if i + 1 == checked else early
    return (early,) if steps == checked else (early, x)


def first_steps(mask: Tensor | None, own: torch.dtype) -> Compute:
    """The latents after CHECKED_STEPS.

    Args:
        mask: of the attention.
        own: the dtype of the weights, which rounds times.
    """

    def compute(transformer: Any, inputs: dict[str, Tensor]) -> Results:
        def velocity(i: int, x: Tensor) -> Tensor:
            t = _rounded(torch.full_like(inputs["timestep"], 1 - i / STEPS), own, x.dtype)
            return run_stock(transformer, inputs | {"timestep": t, "hidden_states": x}, mask)

        with torch.no_grad():
            return euler(velocity, inputs["hidden_states"], CHECKED_STEPS, CHECKED_STEPS)

    return compute


def step_and_gradient(mask: Tensor | None, d_out: Tensor) -> Compute:
    """The velocity and the gradient of the positions.

    Args:
        mask: of the attention.
        d_out: gradient of the velocity, of the distinct pictures first.
    """

    def compute(transformer: Any, inputs: dict[str, Tensor]) -> Results:
        leaf = inputs["encoder_hidden_states"].detach().requires_grad_()
        out = run_stock(transformer, inputs | {"encoder_hidden_states": leaf}, mask)
        (grad,) = torch.autograd.grad(out, leaf, d_out[: len(out)].to(out.dtype))
        return out.detach(), grad

    return compute
