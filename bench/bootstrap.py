"""Intervals of rates by resampling scenes: what other scenes of the same kind would have given."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

RESAMPLES = 1000
Rates = Callable[[Sequence[float]], Mapping[str, float]]
"""(sums over scenes, one a column) -> metrics; NaN or infinity where there is nothing to say."""


def bootstrap(sums: Tensor, rates: Rates) -> dict[str, dict[str, float]]:
    """Mean and 95 % percentile interval of every metric, resampling scenes (Efron, 1979).

    Args:
        sums: [scenes, columns] f64, added up over noise seeds.
        rates: turns the sums of some scenes into metrics.

    Returns:
        {metric: {"mean", "low", "high"}}. A metric that the sample itself has not, or has as an
        infinity, is left out; resamples without one do not count.
    """
    generator = torch.Generator().manual_seed(0)
    even = torch.ones(RESAMPLES, len(sums), dtype=torch.float64)
    drawn = torch.multinomial(even, len(sums), replacement=True, generator=generator)
    weights = torch.zeros_like(even).scatter_add_(1, drawn, even)
    # row 0 is the sample itself
    weights = torch.cat([even[:1], weights])
    found = [rates(row) for row in (weights @ sums).tolist()]
    ends, table = torch.tensor([0.025, 0.975], dtype=torch.float64), {}
    for name in found[0]:
        values = torch.tensor([rate[name] for rate in found], dtype=torch.float64)
        if values[0].isfinite():
            values = values.masked_fill(~values.isfinite(), torch.nan)
            low, high = torch.nanquantile(values[1:], ends).tolist()
            table[name] = {"mean": values[0].item(), "low": low, "high": high}
    return table
