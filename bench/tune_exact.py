"""What the kernels of an attention must give: for ``bench tune``, which runs each of them alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bench.check import NAMES, Yardstick
from bench.measure import Results

FLOAT32_CAP = 2e-5
"""Error of lse and delta, relative to the largest magnitude, absolute below 1."""


@dataclass(frozen=True, slots=True)
class Exact:
    """All results of one attention, each exact where another kernel would have made it.

    Attributes:
        ruler: of out and the gradients.
        out: [B, S, H, D], exact but for the rounding to its dtype.
        lse: [B, H, S] f32, likewise.
        delta: [B, H, S] f32, rowsum(dO * out).
        lse_limit: largest error allowed of lse.
    """

    ruler: Yardstick
    out: Tensor
    lse: Tensor
    delta: Tensor
    lse_limit: float

    @classmethod
    def of(
        cls, ruler: Yardstick, lse: Tensor, d_out: Tensor, lse_limit: float | None = None
    ) -> "Exact":
        """Work out what is missing; without a limit lse is held to that of any float32."""
        out = ruler.exact["out"].to(d_out.dtype)
        delta = (out.float() * d_out.float()).sum(-1).transpose(1, 2).contiguous()
        return cls(ruler, out, lse, delta, float32_limit(lse) if lse_limit is None else lse_limit)

    def faults(self, names: Sequence[str], results: Results) -> list[str]:
        """What is wrong with results of these names, of NAMES, lse and delta; empty if nothing."""
        named = dict(zip(names, results, strict=True))
        found = self.ruler.faults([named.get(name, self.ruler.exact[name]) for name in NAMES])
        for name, exact, limit in (
            ("lse", self.lse, self.lse_limit),
            ("delta", self.delta, float32_limit(self.delta)),
        ):
            if name not in named:
                continue
            if named[name].shape != exact.shape:
                found.append(f"{name} is {list(named[name].shape)}, not {list(exact.shape)}")
                continue
            error = (named[name] - exact).abs().max().item()
            if not error <= limit:  # NaN is not
                found.append(f"{name} is off by {error:.2e}, allowed {limit:.2e}")
        return found


def float32_limit(exact: Tensor) -> float:
    """How far a float32 result may be off."""
    return FLOAT32_CAP * max(1.0, exact.abs().max().item())
