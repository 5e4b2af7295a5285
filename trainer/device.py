"""The only file that knows cpu, cuda and hpu apart."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import platform
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hlrlhf.settings import Settings
from hlrlhf.trainer import kernels, randomness
from hlrlhf.trainer.errors import DeviceError, TrainerError
from hlrlhf.trainer.kernels import Kernels, Layer
from hlrlhf.trainer.pieces import Piece, Readable

Step = Callable[[], None]


class Device:
    """What a rank computes on.

    Attributes:
        backend: name of the collective backend.
        torch: the rank's device.
        pad_to: widths of token batches are rounded up to a multiple of this; devices that compile
            for each new shape ask for few of them.
        static_cache: whether the key-value cache must have one shape for the whole generation.
        has_fp64: whether it computes in fp64.
        has_kernels: whether there are kernels of our own for it.
        loop: which of our own loops over tokens suits it: ``shrinking``, where a batch that loses
            rows is faster; ``fixed``, where one that keeps its shape is; or ``none``.
    """

    backend = "gloo"
    pad_to = 1
    static_cache = False
    has_fp64 = True
    has_kernels = False
    loop = "fixed"

    def __init__(self, settings: Settings, local_rank: int):
        self.torch = torch.device("cpu")
        self._random = self._sources()

    @staticmethod
    def _sources(**own: Any) -> dict[str, Any]:
        """What holds a state of random numbers, of one form; `own` are the device's."""
        return {
            "torch": torch.random,
            "python": randomness.Python,
            "numpy": randomness.NumPy,
            **own,
        }

    def seed(self, seed: int) -> None:
        """Begin all random numbers of this rank anew."""
        for source in self._random.values():
            source.manual_seed(seed)

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Draw random numbers from `seed`; afterwards they go on as if none had been drawn."""
        with self._going_back():
            self.seed(seed)
            yield

    @contextlib.contextmanager
    def undrawn_on_error(self) -> Iterator[None]:
        """Draw random numbers; after an exception they go on as if none had been drawn."""
        with self._going_back() as back:
            yield
            back.pop_all()

    def _going_back(self) -> contextlib.ExitStack:
        """A context at whose end the random numbers are where they are now."""
        back = contextlib.ExitStack()
        for source in self._random.values():
            back.callback(source.set_rng_state, source.get_rng_state())
        return back

    def state(self) -> dict[str, Piece]:
        """Where this rank's random numbers are, for each of their sources."""
        rank = dist.get_rank()
        return {
            f"{name}.rank-{rank}": Piece.whole(source.get_rng_state())
            for name, source in self._random.items()
        }

    def restore(self, state: Mapping[str, Readable]) -> None:
        """Go on from a state; a rank that it does not know goes on as it was seeded."""
        for source, (name, piece) in zip(self._random.values(), self.state().items(), strict=True):
            if (stored := state.get(name)) is not None:
                piece.fill(stored)
                source.set_rng_state(piece.values)

    def step_done(self) -> None:
        """Tell the device that a part of a step is complete."""

    @contextlib.contextmanager
    def generating(self, model: Any) -> Iterator[dict[str, Any]]:
        """Prepare `model` for generation; yields further arguments for its ``generate``.

        Args:
            model: the module whose forward ``generate`` calls, so not peft's wrapper around it.
        """
        yield {}

    def capturing(self) -> Callable[[Step], Step]:
        """For one rollout: what makes its steps cheap to take again and again.

        Each reads and writes the same memory each time, keeps nothing else, and asks for nothing
        that the device alone knows.
        """
        return lambda step: step

    def products(
        self, weight: Tensor, bias: Tensor | None, rows: int
    ) -> dict[str, Callable[[], Layer]]:
        """Other ways than torch's own to multiply a few rows with a layer's weights [out, in].

        By name, each made on demand. They are without gradient.
        """
        return {}

    @property
    def kernels(self) -> Kernels | None:
        """Kernels of our own; None without any, after a warning where there should be some."""
        return None

    def adamw(
        self, groups: list[dict[str, Any]], *, on_host: bool, **options: Any
    ) -> torch.optim.Optimizer:
        """AdamW in its fastest form that needs no compiler, here or on the host's processors."""
        return torch.optim.AdamW(groups, fused=True, **options)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A tensor in host memory as the device reads it fastest; itself where that is as it is."""
        return tensor

    def synchronize(self) -> None:
        """Wait until all work is done, so that a clock tells the truth."""

    def peak_memory(self) -> int:
        """Most bytes of the device's memory that this rank has held so far.

        On processors, of the machine's memory: everything that the process has held.
        """
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Cpu(Device):
    """Processors, with gloo between the ranks."""

    has_kernels = True
    loop = "shrinking"

    def __init__(self, settings: Settings, local_rank: int):
        super().__init__(settings, local_rank)
        self._speaks = local_rank == 0  # for its node
        _keep_memory()
        # DeepSpeed would build a shared-memory all-reduce in C++ at the first start; gloo does.
        ops = importlib.import_module("deepspeed.ops")
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if settings.dtype == "bf16" and self._speaks and not _has_bf16_units():
            print(
                "warning: this processor has no AVX512-BF16 or AMX, where bf16 is several times "
                "slower than fp32; consider HL_DTYPE=fp32",
                flush=True,
            )

    def products(
        self, weight: Tensor, bias: Tensor | None, rows: int
    ) -> dict[str, Callable[[], Layer]]:
        found: dict[str, Callable[[], Layer]] = {}
        if torch.backends.mkldnn.is_available() and (  # type: ignore[no-untyped-call]
            weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            found["packed"] = lambda: _packed(weight, bias, rows)
        if (own := self.kernels) is not None:
            found["own"] = lambda: own.product(weight, bias, rows)
        return found

    @functools.cached_property
    def kernels(self) -> Kernels | None:
        try:
            return kernels.compiled()
        except OSError as error:
            if self._speaks:
                print(
                    "warning: answers are sampled more slowly, as no kernels can be compiled "
                    f"for this processor: {error}; name a C++ compiler in CXX, or set "
                    "HL_GENERATION_FAST_KERNELS=false",
                    flush=True,
                )
            return None


class Cuda(Device):
    """NVIDIA GPUs, with NCCL between the ranks."""

    backend = "nccl"

    def __init__(self, settings: Settings, local_rank: int):
        if not torch.cuda.is_available():
            kind = DeviceError if torch.version.cuda else TrainerError
            raise kind("device = cuda, but torch sees no GPU on this node")
        if local_rank >= torch.cuda.device_count():
            raise TrainerError(
                f"devices_per_node = {settings.devices_per_node}, but this node shows "
                f"{torch.cuda.device_count()} GPUs to the job"
            )
        self.torch = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.torch)
        self._random = self._sources(cuda=torch.cuda)

    def capturing(self) -> Callable[[Step], Step]:
        # What they compute on the way may lie in the same memory: one is taken after the other.
        pool = torch.cuda.graph_pool_handle()
        return lambda step: _Captured(step, pool)

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()


class _Captured:
    """A step as a CUDA graph: a kernel is not launched from here any more, one after the other.

    Args:
        step: see `Device.capturing`.
        pool: of memory, see torch.cuda.graph_pool_handle.
    """

    def __init__(self, step: Step, pool: Any):
        self._step = step
        self._pool = pool
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self._is_warm:
            # Libraries make room for themselves at a first call, which a graph cannot hold. And a
            # capture that fails leaves torch's allocator and stream as they were in the middle of
            # it: where something asks the device, which would fail it, that shows here.
            plain, mode = torch.cuda.is_current_stream_capturing, torch.cuda.get_sync_debug_mode()
            torch.cuda.is_current_stream_capturing = _ask_nothing
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                torch.cuda.is_current_stream_capturing = plain
            self._is_warm = True
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # Nothing is computed yet; and what other threads do meanwhile, such as NCCL's, is no
            # part of it.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                self._step()
            self._graph = graph
        self._graph.replay()


def _ask_nothing() -> bool:
    """In place of torch.cuda.is_current_stream_capturing: that a graph is captured.

    transformers then asks no tensor for a number, as it else does of a mask, whether it is needed.
    """
    return True


class Hpu(Device):
    """Intel Gaudi, with HCCL between the ranks.

    In lazy mode work is collected until ``mark_step`` and generation runs as HPU graphs; in eager
    mode each operation runs at once.
    """

    backend = "hccl"
    # Each new shape compiles a recipe: a few widths, one cache shape.
    pad_to = 128
    has_fp64 = False

    def __init__(self, settings: Settings, local_rank: int):
        if importlib.util.find_spec("habana_frameworks") is None:
            raise TrainerError(
                "device = hpu, but this Python has no habana_frameworks; use the Python of Intel's "
                "Gaudi image or installer, or set HL_DEVICE"
            )
        self._lazy = settings.hpu.lazy_mode
        # Read once, when the bridge is loaded; which torch may have done when it was imported.
        os.environ.setdefault("PT_HPU_LAZY_MODE", str(int(self._lazy)))
        self._core = importlib.import_module("habana_frameworks.torch.core")
        self._hpu = importlib.import_module("habana_frameworks.torch.hpu")
        importlib.import_module("habana_frameworks.torch.distributed.hccl")
        internal = importlib.import_module("habana_frameworks.torch.utils.internal")
        if internal.is_lazy() != self._lazy:
            raise TrainerError(
                f"hpu.lazy_mode = {self._lazy}, but the Gaudi bridge was loaded in "
                f"{'lazy' if internal.is_lazy() else 'eager'} mode; start the ranks with "
                f"PT_HPU_LAZY_MODE={int(self._lazy)}, or change HL_HPU_LAZY_MODE"
            )
        if not self._hpu.is_available():
            raise DeviceError("device = hpu, but the Gaudi bridge sees no device on this node")
        # torch's own manual_seed leaves the device's numbers as they are.
        self._random = self._sources(hpu=self._hpu.random)
        # A number that is asked for cuts in two what lazy mode collects, and no graph can hold it.
        torch.cuda.is_current_stream_capturing = _ask_nothing
        self._graphs = self._lazy and settings.enable_hpu_graphs
        self._optimum = _adapt_transformers()
        # Optimum's generate keeps shapes static in a way of its own.
        self.static_cache = not self._optimum
        self.loop = "none" if self._optimum else "fixed"
        # The module id of a rank is its LOCAL_RANK, and torch's index is always 0 in a process.
        self.torch = torch.device("hpu")

    def step_done(self) -> None:
        if self._lazy:
            self._core.mark_step()

    @contextlib.contextmanager
    def generating(self, model: Any) -> Iterator[dict[str, Any]]:
        arguments: dict[str, Any] = {}
        if self._optimum:
            # Optimum's generate stops at the longest answer only, unless it is told otherwise.
            arguments = {
                "lazy_mode": self._lazy,
                "hpu_graphs": self._graphs,
                "ignore_eos": False,
            }
        if not self._graphs:
            yield arguments
            return
        # A graph replays on the addresses of weights and cache that it was recorded with: it serves
        # one rollout, leaves its memory to the training, and training never runs through it.
        plain = model.forward
        self._hpu.wrap_in_hpu_graph(model)
        try:
            yield arguments
        finally:
            model.clear_cache()
            model.forward = plain

    def adamw(
        self, groups: list[dict[str, Any]], *, on_host: bool, **options: Any
    ) -> torch.optim.Optimizer:
        if on_host:
            return super().adamw(groups, on_host=on_host, **options)
        optimizers = importlib.import_module("habana_frameworks.torch.hpex.optimizers")
        optimizer: torch.optim.Optimizer = optimizers.FusedAdamW(groups, **options)
        return optimizer

    def synchronize(self) -> None:
        self._hpu.synchronize()

    def peak_memory(self) -> int:
        return int(self._hpu.max_memory_allocated())


def select(settings: Settings, local_rank: int) -> Device:
    """The device of this rank, ready to use.

    Raises:
        TrainerError: the node does not have what the settings ask for.
        DeviceError: it does, or should, but the device does not answer.
    """
    os.environ["DS_ACCELERATOR"] = settings.device
    try:
        device = {"cpu": Cpu, "cuda": Cuda, "hpu": Hpu}[settings.device](settings, local_rank)
        torch.ones(1, device=device.torch).item()
    except RuntimeError as error:
        words = f"device = {settings.device} does not answer on this node: {error}"
        raise DeviceError(words) from error
    return device


def _adapt_transformers() -> bool:
    """Let Optimum for Gaudi patch transformers where a site has installed it."""
    try:
        found = importlib.util.find_spec("optimum.habana") is not None
    except ModuleNotFoundError:
        found = False
    if found:
        utilities = importlib.import_module("optimum.habana.transformers.modeling_utils")
        utilities.adapt_transformers_to_gaudi()
        # Its BLOOM takes the ranks for one tensor-parallel model; ours hold a whole one each.
        with contextlib.suppress(ImportError, AttributeError):
            bloom = importlib.import_module(
                "optimum.habana.transformers.models.bloom.modeling_bloom"
            )
            bloom.GaudiBloomForCausalLM.set_tp_for_inference(1)
    return found


def _packed(weight: Tensor, bias: Tensor | None, rows: int) -> Layer:
    """From a copy in blocks, as oneDNN's kernels read it; torch's inductor freezes weights so."""
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda read: product(read, blocks, bias, "none", [], "")


# Of larger tensors than this the memory is given back: it would leave gaps where nothing fits.
KEPT = 2**27


def _keep_memory() -> None:
    """Have the C library keep the memory of tensors for the next ones.

    Linux clears what it gives, which one thread does while the others wait: in a step some GB, as
    each micro batch takes new memory for gradients. Left alone where MALLOC_MMAP_THRESHOLD_ or
    MALLOC_TRIM_THRESHOLD_ says otherwise, see mallopt(3), and where that is not glibc's.
    """
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        mallopt(mmap, KEPT)
        mallopt(trim, -1)  # never


def _has_bf16_units() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # a guess would only be noise
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
