"""What a run changes: weights, their average, and the optimizers' memory."""

import copy
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from train.batch import Batch
from train.checkpoint import read_state
from train.config import TrainConfig
from train.optim import build_optimizers, load_optimizers, optimizer_tensors
from train.ranks import Ranks
from train.stage import Stage


class State:
    """Everything that a checkpoint holds, on every rank the same.

    Args:
        config: of the run.
        stage: whose ``trained`` learns.
        ranks: that share the work.

    Attributes:
        model: ``stage.trained``.
        ema: its moving average.
        optimizers: by name.
        inherited: the average is that of another run, which this one goes on from.
    """

    def __init__(self, config: TrainConfig, stage: Stage, ranks: Ranks) -> None:
        self.config, self.stage, self.ranks = config, stage, ranks
        self.model = stage.trained.train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = build_optimizers(self.model, config)
        self.inherited = False
        # made by start: DDP takes parameters as they are then
        self._whole: nn.Module = _Losses(stage)

    def start(self) -> None:
        """Gradients are averaged over the ranks from now on; weights must be what they shall be."""
        if self.ranks.world > 1:
            ids = [self.ranks.device] if self.ranks.device.type == "cuda" else None
            self._whole = DistributedDataParallel(
                self._whole, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def tensors(self) -> dict[str, Tensor]:
        """Of a checkpoint: "model/...", "ema/..." and "optim/..."."""
        found = {f"optim/{name}": t for name, t in optimizer_tensors(self.optimizers).items()}
        for kind, module in (("model", self.model), ("ema", self.ema)):
            found |= {f"{kind}/{name}": t for name, t in module.state_dict().items()}
        return found

    def load(self, path: Any) -> None:
        """Take over a checkpoint, in place."""
        self.take_over(*(read_state(path, kind) for kind in ("model/", "ema/", "optim/")))

    def take_over(
        self,
        model: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        optimizers: Mapping[str, Tensor],
    ) -> None:
        """Likewise, by its parts."""
        self.model.load_state_dict(dict(model))
        self.ema.load_state_dict(dict(ema))
        load_optimizers(self.optimizers, optimizers)

    def backward(self, batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of a step, clipped.

        Args:
            batches: this rank's micro-batches.

        Returns:
            (this rank's mean losses; norm of all ranks' mean gradient before it was clipped).
        """
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            # the backward may run blocks again, by the same kernels
            with self._apart(last=number == len(batches)), self.attention():
                with self.precision():
                    losses = self._whole(batch)
                (losses["loss"] / len(batches)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        return {name: value / len(batches) for name, value in sums.items()}, norm

    def update(self, step: int) -> None:
        """Take the step that the gradients ask for, and average."""
        for optimizer in self.optimizers.values():
            optimizer.step()
        # one that was taken over stands for many steps already
        warm = 1.0 if self.inherited else (1 + step) / (10 + step)
        decay = min(self.config.ema_decay, warm)
        with torch.no_grad():
            averages, values = (list(m.parameters()) for m in (self.ema, self.model))
            torch._foreach_lerp_(averages, values, 1 - decay)  # pyrefly: ignore

    def forget(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """While open, the stage holds the averaged weights; nothing learns."""
        own = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.state_dict())
        self.model.eval()
        try:
            with torch.no_grad(), self.precision(), self.attention():
                yield
        finally:
            self.model.load_state_dict(own)
            self.model.train()

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast as the config says."""
        half = self.config.precision == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=half)

    def attention(self) -> AbstractContextManager[Any]:
        """On a CPU, plain products: the flash kernel's backward costs six times as much there."""
        on_cpu = self.ranks.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()

    def _apart(self, last: bool) -> Any:
        """Ranks add their gradients up with the last micro-batch only."""
        wrapped = self._whole
        alone = last or not isinstance(wrapped, DistributedDataParallel)
        return nullcontext() if alone else wrapped.no_sync()


class _Losses(nn.Module):
    """A stage as a module, whose forward DDP watches."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.trained = stage.trained
        self._losses = stage.losses

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The stage's losses of a batch."""
        return self._losses(batch)
