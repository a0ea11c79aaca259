"""Run a function as a CUDA graph, one for each kind of input, and never a stale one."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sda_fast.ops.device_tables import capturing

Function = Callable[..., Tensor]
LIMIT = 8
GRAPH_DEVICES = ("cuda",)
_one_capture = RLock()  # a capture does not survive another one of the process
WARM_UPS = 2  # libraries set themselves up, kernels compile, tables move: no capture may do that


class Replay(Protocol):
    """A captured function."""

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Its result for inputs of the captured kind, in memory of its own."""
        ...

    def repeat(self) -> None:
        """Run it once more on what it reads, for what that changes in place."""
        ...

    def wait(self) -> None:
        """Before the current stream changes what it reads: until no other one runs it."""
        ...

    def release(self) -> None:
        """Give the graph up, once the device is done with it."""
        ...


class Pool(Protocol):
    """What captures functions on a device."""

    def capture(self, function: Function, inputs: Sequence[Tensor]) -> Replay:
        """A replay of a function for inputs like these."""
        ...


class GraphCache:
    """CUDA graphs of functions of tensors, the least recently used given up for a new one.

    A graph repeats launches on fixed addresses. Weights that change in place are seen, as they are
    read anew; where a parameter or buffer lies elsewhere or otherwise, where a submodule is another
    one, in another mode or has other hooks, and where a LoRA layer has another scale, the graph is
    captured again. What else a function reads from Python must be in ``about``; hooks run at
    captures only. Calls
    from several threads and streams take turns; while one captures, no other thread may wait for
    the whole device. A copy of a cache is an empty one.

    Args:
        limit: graphs that are kept, at least 1.
        make_pool: gives what captures on a device; None means a ``GraphPool``.

    Raises:
        ValueError: limit is below 1.
    """

    def __init__(
        self, limit: int = LIMIT, make_pool: Callable[[torch.device], Pool] | None = None
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.limit = limit
        self._make_pool = make_pool or GraphPool
        self._pool: tuple[torch.device, Pool] | None = None
        self._graphs: dict[Hashable, tuple[Replay, Addresses]] = {}  # last used last
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._graphs)

    def __reduce__(self) -> tuple:
        return GraphCache, (self.limit,)

    def run(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        modules: Sequence[nn.Module],
        about: Hashable = None,
    ) -> Tensor:
        """``function(*inputs)`` without gradients, by a graph; inside another capture as it is.

        Args:
            function: of tensors to a tensor; what it does may depend on the modules, on the shapes
                and dtypes of the inputs and on about, and on nothing else.
            inputs: on any device; they are copied to the modules' one.
            modules: whose weights it reads, all on one CUDA device.
            about: what else tells functions of one cache apart.

        Returns:
            A tensor of its own, that no later call overwrites.

        Raises:
            ValueError: the modules are on several devices or on none with graphs.
            RuntimeError: the function does what no graph can hold, as waiting for the device.
        """
        if capturing():
            return function(*inputs)
        with self._lock, torch.no_grad():
            now = Addresses.of(modules)
            kind = about, kind_of(inputs)
            replay, then = self._graphs.pop(kind, (None, None))
            if replay is not None and then != now:
                replay.release()
                replay = None
            if replay is None:
                while len(self._graphs) >= self.limit:
                    self._drop_oldest()
                replay = self._capture(function, inputs, now.device())
                now = Addresses.of(modules)  # a first call may set modules up
            self._graphs[kind] = replay, now
            return replay(inputs)

    def clear(self) -> None:
        """Give all graphs and their memory up."""
        with self._lock:
            self._clear()

    def _capture(
        self, function: Function, inputs: Sequence[Tensor], device: torch.device
    ) -> Replay:
        pool = self._pool_on(device)
        try:
            with torch.inference_mode(False), torch.no_grad():  # its tensors outlive the mode
                return pool.capture(function, inputs)
        except BaseException:
            self._pool = None  # a capture that broke off may leave its memory unusable
            raise

    def _pool_on(self, device: torch.device) -> Pool:
        if self._pool is None or self._pool[0] != device:
            self._clear()
            self._pool = device, self._make_pool(device)
        return self._pool[1]

    def _clear(self) -> None:
        while self._graphs:
            self._drop_oldest()
        self._pool = None

    def _drop_oldest(self) -> None:
        replay, _ = self._graphs.pop(next(iter(self._graphs)))
        replay.release()


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where everything is that modules read.

    Attributes:
        modules: they and all theirs; held, so that no other gets the identity of one.
        modes: which of them are in training mode.
        tensors: address, dtype, shape and strides of each parameter and buffer.
        devices: of these.
        strengths: what LoRA layers keep in Python: their scales, and which of them are active.
        hooks: what is called around modules.
    """

    modules: list[nn.Module]
    modes: list[bool]
    tensors: list[tuple]
    devices: set[torch.device]
    strengths: list[str]
    hooks: list[tuple]

    @classmethod
    def of(cls, roots: Sequence[nn.Module]) -> "Addresses":
        """Look at modules, as they are now."""
        modules, tensors, devices, strengths, hooks, seen = [], [], set(), [], [], set()
        left = list(roots)
        # several times as fast as parameters() and buffers(): this comes before every replay
        while left:
            module = left.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            modules.append(module)
            for table in (module._parameters, module._buffers):
                for t in table.values():
                    if t is not None:
                        tensors.append((t.data_ptr(), t.dtype, t.shape, t.stride()))
                        devices.add(t.device)
            if module._forward_hooks or module._forward_pre_hooks:
                hooks.append((*module._forward_hooks, *module._forward_pre_hooks))
            if "scaling" in vars(module):
                strengths.append(_strength(vars(module)))
            left += [child for child in module._modules.values() if child is not None]
        modes = [module.training for module in modules]
        return cls(modules, modes, tensors, devices, strengths, hooks)

    def device(self) -> torch.device:
        """The one they are all on.

        Raises:
            ValueError: there are several, it has no CUDA graphs, or a tensor has no address.
        """
        if len(self.devices) != 1 or any(d.type not in GRAPH_DEVICES for d in self.devices):
            found = sorted(map(str, self.devices))
            raise ValueError(f"a CUDA graph needs all weights on one CUDA device, got {found}")
        if any(not address and shape.numel() for address, _, shape, _ in self.tensors):
            raise ValueError("a CUDA graph needs plain weights, got a tensor without an address")
        (device,) = self.devices
        return device


def _strength(layer: Mapping[str, Any]) -> str:
    """What a LoRA layer of peft multiplies by, as text."""
    names = "scaling", "_active_adapter", "_disable_adapters", "merged_adapters"
    return repr([layer.get(name) for name in names])


class GraphPool:
    """Captures CUDA graphs that share their memory, so that one of them runs at a time.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._handle = torch.cuda.graph_pool_handle()
            self._side = torch.cuda.Stream()
            self._done = torch.cuda.Event()

    def capture(self, function: Function, inputs: Sequence[Tensor]) -> Replay:
        """Run a function a few times, then once more into a graph.

        Raises:
            RuntimeError: it does what no graph can hold.
        """
        autocast_keeps = torch.is_autocast_cache_enabled()
        graph = torch.cuda.CUDAGraph()
        with _one_capture, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            # the casts that autocast keeps are of today's weights
            torch.set_autocast_cache_enabled(False)
            try:
                held = [torch.empty_like(t, device=self.device).copy_(t) for t in inputs]
                self._warm_up(function, held)
                # the workspace that the graph will use must be the graph's, which nobody clears
                torch._C._cuda_clearCublasWorkspaces()
                with torch.cuda.graph(
                    graph, self._handle, self._side, capture_error_mode="thread_local"
                ):
                    result = function(*held)
                torch._C._cuda_clearCublasWorkspaces()
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                shapes = [tuple(t.shape) for t in inputs]
                raise RuntimeError(f"inputs of {shapes} gave no CUDA graph: {error}") from error
            finally:
                torch.cuda.set_stream(current)  # a capture that breaks off does not come back to it
                torch.set_autocast_cache_enabled(autocast_keeps)
        return GraphReplay(graph, held, result, self._done)

    def _warm_up(self, function: Function, inputs: Sequence[Tensor]) -> None:
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                for _ in range(WARM_UPS):
                    function(*inputs)
        finally:
            current.wait_stream(self._side)


@dataclass(frozen=True, slots=True)
class GraphReplay:
    """One captured function.

    Attributes:
        graph: what replays it.
        inputs: the tensors it reads.
        result: the tensor it writes.
        done: recorded behind the last use of the pool's memory.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Tensor
    done: torch.cuda.Event

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """See Replay; on the current stream of the graph's device."""
        with torch.cuda.device(self.result.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            for held, given in zip(self.inputs, inputs, strict=True):
                held.copy_(given)
            self.graph.replay()
            result = self.result.clone()
            self.done.record(stream)
        return result

    def wait(self) -> None:
        """See Replay."""
        torch.cuda.current_stream(self.result.device).wait_event(self.done)

    def repeat(self) -> None:
        """See Replay."""
        with torch.cuda.device(self.result.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            self.graph.replay()
            self.done.record(stream)

    def release(self) -> None:
        """See Replay."""
        self.done.synchronize()
        self.graph.reset()


def kind_of(inputs: Sequence[Tensor]) -> Hashable:
    """What a graph holds for: all that changes the launches, but for what the modules hold."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        tuple((t.shape, t.dtype) for t in inputs),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        cudnn.allow_tf32,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
