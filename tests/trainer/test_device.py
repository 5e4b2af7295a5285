"""The devices; for Gaudi, a stand-in of its software that records the calls."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
from ranks import Run, prepare, train, variables
from tiny import one_rank  # noqa: F401

from hlrlhf.settings import Settings, layers
from hlrlhf.trainer import device
from hlrlhf.trainer.data import reading
from hlrlhf.trainer.decoding.decoder import sampling
from hlrlhf.trainer.errors import DeviceError, TrainerError, is_of_node
from hlrlhf.trainer.pieces import Piece
from hlrlhf.trainer.ppo import rollout

HERE = Path(__file__).parents[1]
GAUDI = str(HERE / "gaudi")
OPTIMUM = str(HERE / "gaudi-optimum")
# An epsilon above nearly all gradients: weights move in proportion to them, roundings included.
GENTLE = {"optimizer__epsilon": 1e-2}


@pytest.fixture(autouse=True)
def _own_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """`select` tells DeepSpeed of the device through the environment."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def settings_of(**changes: Any) -> Settings:
    mandatory = ("tag", "base_out_path", "actor.model_path", "critic.model_path", "dataset.path")
    values = dict.fromkeys(mandatory, "x") | changes
    return layers.resolve(environ={}, flags=[f"{n}={v}" for n, v in values.items()]).settings


def drawn() -> list[float]:
    """A number from each source that a reward function may draw from; Gaussians come in pairs."""
    return [float(torch.rand(1)), random.gauss(), random.random(), *numpy.random.normal(size=3)]


@pytest.mark.usefixtures("one_rank")
def test_all_random_numbers_follow_from_the_seed_and_from_a_state() -> None:
    own = device.select(settings_of(device="cpu"), 0)
    own.seed(2**32 - 1)
    first = drawn()
    own.seed(2**32 - 1)
    assert drawn() == first
    kept = {name: Held(piece) for name, piece in own.state().items()}
    expected = drawn()
    with own.seeded(2**32 - 1):
        assert drawn() == first
    own.restore(kept)
    assert drawn() == expected
    own.restore(kept)
    with own.seeded(5):
        drawn()
    assert drawn() == expected
    own.restore(kept)
    with pytest.raises(ZeroDivisionError), own.undrawn_on_error():
        raise ZeroDivisionError(drawn())
    assert drawn() == expected
    own.restore(kept)
    with own.undrawn_on_error():
        assert drawn() == expected
    assert drawn() != expected


class Held:
    """A piece that was copied, as a checkpoint reads it."""

    def __init__(self, piece: Piece):
        self.name, self.total, self.values = "a piece", piece.total, piece.values.clone()

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.values[start:stop]


def environment(*stand_ins: str, **more: str) -> dict[str, str]:
    own = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_STATE_HOME")}
    return own | {"PYTHONPATH": os.pathsep.join(stand_ins)} | more


def on_gaudi(directory: Path, *stand_ins: str, **more: str) -> tuple[Run, list[str]]:
    """A run of one rank on the stand-in, and the calls that it recorded."""
    calls = directory / "calls"
    # Port 0: the only rank asks nobody else.
    environ = environment(*stand_ins, STAND_IN_CALLS=str(calls), **variables(0, 1, 0), **more)
    done = subprocess.run(
        [sys.executable, "-m", "hlrlhf.trainer", str(directory)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    recorded = calls.read_text().splitlines() if calls.exists() else []
    return Run(directory, [done.returncode], [done.stdout]), recorded


def test_gaudi_needs_its_software() -> None:
    with pytest.raises(TrainerError, match=r"no habana_frameworks.*HL_DEVICE"):
        device.select(settings_of(device="hpu"), 0)


def test_the_peak_of_memory_on_processors_is_the_processs_own() -> None:
    cpu = device.select(settings_of(device="cpu"), 0)
    now = psutil.Process().memory_info().rss
    held = torch.ones((cpu.peak_memory() - now) // 4 + (64 << 20))
    # Beyond what has been held so far by 64 Mi numbers, less what the process let go meanwhile.
    assert cpu.peak_memory() > now + len(held) * 3
    assert cpu.peak_memory() < psutil.virtual_memory().total


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.knob("device")
def test_cuda_needs_a_gpu() -> None:
    with pytest.raises(TrainerError, match="torch sees no GPU"):
        device.select(settings_of(device="cuda"), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_does_not_answer_is_the_nodes_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_device(_: torch.device) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(DeviceError, match="device = cuda does not answer on this node") as caught:
        device.select(settings_of(device="cuda"), 0)
    assert is_of_node(caught.value)
    assert not is_of_node(TrainerError("no such model"))
    lost = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    assert not is_of_node(lost)
    lost.error_code = 214  # type: ignore[attr-defined]
    assert is_of_node(lost)


def test_cuda_needs_as_many_gpus_as_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TrainerError, match=r"devices_per_node = 4, .* shows 2 GPUs"):
        device.select(settings_of(device="cuda", devices_per_node=4), 2)


def test_what_asks_a_gpu_for_a_number_is_found_before_it_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A capture that fails would leave torch's memory and streams in the middle of it."""
    modes: list[int | str] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    plain = torch.cuda.is_current_stream_capturing

    def step() -> None:
        assert torch.cuda.is_current_stream_capturing(), "transformers asks nothing then"
        assert modes == [0, "error"]
        raise RuntimeError("called a synchronizing CUDA operation")

    captured = device._Captured(step, None)
    for _ in range(2):
        modes[:] = [0]
        with pytest.raises(RuntimeError, match="synchronizing"):
            captured()
        assert modes[-1] == 0
        assert torch.cuda.is_current_stream_capturing is plain


def test_the_steps_of_a_rollout_are_captured_once_and_into_one_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    @contextlib.contextmanager
    def capture(_: Graph, pool: int, capture_error_mode: str) -> Iterator[None]:
        done.append(f"pool {pool} {capture_error_mode}")
        yield

    pools = iter(range(9))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    cuda = device.Cuda.__new__(device.Cuda)
    for rollout_pool in range(2):
        capturing = cuda.capturing()
        for name in ("of 128 columns", "of 256"):
            done.clear()
            taken = capturing(lambda name=name: done.append(name))
            for _ in range(3):
                taken()
            captured = [f"pool {rollout_pool} thread_local", name, "replay"]
            assert done == [name, *captured, "replay"]


def test_cpu_says_that_bf16_is_slow_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for has_units, dtype, rank, warned in (
        (False, "bf16", 0, True),
        (False, "bf16", 1, False),
        (False, "fp32", 0, False),
        (True, "bf16", 0, False),
    ):
        monkeypatch.setattr(device, "_has_bf16_units", lambda has_units=has_units: has_units)
        device.select(settings_of(device="cpu", dtype=dtype), rank)
        assert ("HL_DTYPE=fp32" in capsys.readouterr().out) is warned


def test_gaudis_own_adamw_is_for_the_device_alone() -> None:
    hpu = device.Hpu.__new__(device.Hpu)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    assert type(hpu.adamw(groups, on_host=True, lr=0.1)) is torch.optim.AdamW
    with pytest.raises(ModuleNotFoundError, match="habana_frameworks"):
        hpu.adamw(groups, on_host=False, lr=0.1)


def test_gaudi_compiles_for_few_shapes() -> None:
    multiple = device.Hpu.pad_to
    config = sampling(settings_of(), None, [2], 0, device.Hpu.__new__(device.Hpu)).config
    shapes = set()
    for prompt in range(1, 257, 5):
        for answer in range(1, 257, 5):
            _, mask = reading.pad_left([[5] * prompt], 0, multiple)
            sequences = torch.full((1, mask.shape[1] + answer), 5)
            made = rollout.from_sequences(sequences, mask, config, multiple)
            assert made.lengths.tolist() == [answer]
            shapes.add((mask.shape[1], made.answer_width))
    assert len(shapes) == 4


@pytest.mark.slow
def test_lazy_mode_with_graphs_end_to_end(demo_models: Path, tmp_path: Path) -> None:
    """With LoRA, where generate calls a module below peft's wrapper."""
    lora = {"lora__dim": 4, "lora__actor_lr": 1e-2, "mbs": 4, **GENTLE}
    prepare(tmp_path / "hpu", demo_models, device="hpu", hpu__lazy_mode=1, run_steps=2, **lora)
    run, calls = on_gaudi(tmp_path / "hpu", GAUDI)
    assert run.codes == [0], run.output
    assert_as_on_cpu(run, tmp_path / "cpu", demo_models, lora)

    assert calls[0] == "load lazy=True", "the mode was set before the bridge was loaded"
    count = Counter(calls)
    assert count["hccl rank 0 of 1"] >= 1
    assert count["FusedAdamW lr=0.001 betas=(0.9, 0.95) eps=0.01"] == 2
    assert count["synchronize"] == 6, "three clocked parts of two steps"
    # Per step: after each token and the rollout, then two micro batches each for the reference, the
    # reward model, the critic, which learns at once, and the actor. And one to check the first
    # rollout with.
    tokens = count["graph forward"]
    assert count["mark_step"] == tokens + 2 * (1 + 4 * 2) + 1
    assert run.metrics[0]["peak_memory_bytes"] == 3 << 30
    # One graph per rollout; what comes between its making and its end is generation only.
    parts = [call for call in calls if call.startswith(("wrap", "clear", "mark", "graph"))]
    inside = False
    for call in parts:
        if call.startswith("wrap"):
            assert call == "wrap_in_hpu_graph LlamaForCausalLM"
            inside = True
        elif call == "clear_cache":
            inside = False
        elif call == "graph forward":
            assert inside
    assert count["wrap_in_hpu_graph LlamaForCausalLM"] == count["clear_cache"] == 2
    assert count["graph forward"] > 2 * 10, "every token of a rollout"


@pytest.mark.slow
def test_eager_mode_end_to_end(demo_models: Path, tmp_path: Path) -> None:
    changes = {"mbs": 4, "actor__zero_stage": 2, "critic__zero_stage": 0, **GENTLE}
    prepare(tmp_path / "hpu", demo_models, device="hpu", run_steps=2, **changes)
    run, calls = on_gaudi(tmp_path / "hpu", GAUDI)
    assert run.codes == [0], run.output
    assert_as_on_cpu(run, tmp_path / "cpu", demo_models, changes)
    assert calls[0] == "load lazy=False"
    kinds = {call.split()[0] for call in calls}
    expected = {"load", "hccl", "manual_seed", "FusedAdamW", "synchronize"}
    assert kinds == expected, "no mark_step, no graphs"


def assert_as_on_cpu(run: Run, directory: Path, models: Path, changes: dict[str, Any]) -> None:
    """Padded widths and a static cache change nothing in what is computed."""
    prepare(directory, models, run_steps=2, **changes)
    expected = train(directory)
    assert expected.codes == [0], expected.output
    for step, other in zip(run.metrics, expected.metrics, strict=True):
        for name in ("reward", "kl", "length", "value", "return", "critic_loss"):
            assert step[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_the_hybrid_engine_is_tried_where_there_are_kernels(
    demo_models: Path, tmp_path: Path
) -> None:
    """DeepSpeed has some for Gaudi; on what they run into here, the run stops."""
    prepare(tmp_path, demo_models, device="hpu", hybrid_engine=1, mbs=4)
    run, _ = on_gaudi(tmp_path, GAUDI)
    assert run.codes == [1]
    assert "DeepSpeed's hybrid engine cannot generate" in run.output[0]
    assert "set HL_HYBRID_ENGINE=0" in run.output[0]


@pytest.mark.slow
def test_optimum_is_used_where_it_is(demo_models: Path, tmp_path: Path) -> None:
    prepare(tmp_path, demo_models, device="hpu", hpu__lazy_mode=1, run_steps=1)
    run, calls = on_gaudi(tmp_path, GAUDI, OPTIMUM)
    assert run.codes == [0], run.output
    assert calls.count("adapt_transformers_to_gaudi") == 1
    (generate,) = [call for call in calls if call.startswith("generate ")]
    assert generate == "generate lazy_mode=True hpu_graphs=True stops=True cache=None"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lazy", "environ", "words"),
    [
        (1, {"PT_HPU_LAZY_MODE": "0"}, "loaded in eager mode; start .* with PT_HPU_LAZY_MODE=1"),
        (0, {"PT_HPU_LAZY_MODE": "1"}, "loaded in lazy mode; start .* with PT_HPU_LAZY_MODE=0"),
        (0, {"STAND_IN_DEVICES": "0"}, "sees no device on this node"),
    ],
)
def test_a_gaudi_node_that_does_not_fit_is_one_clear_error(
    lazy: int, environ: dict[str, str], words: str, demo_models: Path, tmp_path: Path
) -> None:
    prepare(tmp_path, demo_models, device="hpu", hpu__lazy_mode=lazy)
    run, _ = on_gaudi(tmp_path, GAUDI, **environ)
    assert run.codes == [1]
    (line,) = run.output[0].splitlines()
    assert line.startswith("error: ")
    assert words.partition(" .* ")[0] in line
    assert words.partition(" .* ")[2] in line


GRAPHS = """
import sys
import torch
from hlrlhf.settings import layers
from hlrlhf.trainer import device

flags = [f"{name}=x" for name in
         ("tag", "base_out_path", "actor.model_path", "critic.model_path", "dataset.path")]
flags += ["device=hpu", *sys.argv[1:]]
hpu = device.select(layers.resolve(environ={}, flags=flags).settings, 0)
model = torch.nn.Linear(2, 2).eval()
plain = model.forward
try:
    with hpu.generating(model) as arguments:
        print(arguments, model.forward == plain)
        model(torch.zeros(1, 2, device=hpu.torch))
        raise KeyError
except KeyError:
    print(model.forward == plain)
model.train()(torch.zeros(1, 2, device=hpu.torch)).sum().backward()
"""


@pytest.mark.knob("enable_hpu_graphs", "hpu.lazy_mode")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "in_graph"),
    [
        (["hpu.lazy_mode=1"], True),
        (["hpu.lazy_mode=1", "enable_hpu_graphs=0"], False),
        (["hpu.lazy_mode=0"], False),
    ],
)
def test_graphs_are_for_generation_in_lazy_mode(
    flags: list[str], in_graph: bool, tmp_path: Path
) -> None:
    environ = environment(GAUDI, STAND_IN_CALLS=str(tmp_path / "calls"))
    command = [sys.executable, "-c", GRAPHS, *flags]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{{}} {not in_graph}", "True"]
    calls = (tmp_path / "calls").read_text().splitlines()[1:]
    assert calls == (
        ["wrap_in_hpu_graph Linear", "graph forward", "clear_cache"] if in_graph else []
    )


def test_memory_of_tensors_is_kept_for_the_next_ones() -> None:
    """In a process of its own: how memory is taken is the whole process' and stays so."""
    asked = (
        "import resource, tiny, torch; tiny.cpu(tiny.settings());"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "take = lambda: torch.zeros(30 * 2**20);"  # 120 MB
        # Something small may have come to lie where the first ones were.
        "[take() for _ in range(4)]; before = faults(); take(); print(faults() - before)"
    )
    for given, is_kept in (({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)):
        unset = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")
        environ = {k: v for k, v in os.environ.items() if k not in unset}
        environ |= {"PYTHONPATH": str(HERE)} | given
        words = [sys.executable, "-c", asked]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
        # New memory is 60 faults where a page is as large as it gets, 2 MB.
        assert (int(done.stdout) < 30) is is_kept
