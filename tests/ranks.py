"""Ranks of the trainer as processes of their own, without torchrun between them and the test.

Each is forked from one server that has imported torch and DeepSpeed, which takes longer than a run
of the demo's size; everything after the imports is what ``python -m hlrlhf.trainer`` does.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import runpy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from hlrlhf.jobs.ports import rendezvous_port
from hlrlhf.settings import layers

# Of each rank; `make test-portable` takes more.
THREADS = os.environ.get("HLRLHF_TEST_THREADS", "1")

_turn = itertools.count()
_LIMIT = 240  # seconds; a run of these takes some five
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "datasets", "deepspeed", "hlrlhf.trainer.loop"])


@dataclass(frozen=True)
class Run:
    """What became of a run.

    Attributes:
        directory: the run directory.
        codes: exit code of each rank.
        output: what each rank printed.
    """

    directory: Path
    codes: list[int]
    output: list[str]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.directory / "metrics.jsonl")

    def weights(self, role: str, folder: str = "final") -> dict[str, Any]:
        return load_file(self.directory / "checkpoints" / folder / role / "model.safetensors")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(directory: Path, models: Path, **changes: Any) -> None:
    """A run directory of a small run on the demo's models; a setting is named ``actor__dropout``.

    Answers are the likeliest ones, so that they do not depend on the number of ranks. They
    differ in length, since most prompts hold the first words of one: otherwise a mean over the
    wrong tokens would go unseen.
    """
    directory.mkdir(parents=True, exist_ok=True)
    prompts = directory / "prompts.jsonl"
    rows = read_lines(models / "prompts" / "eval.jsonl")
    begun = [
        row["prompt"] + " ".join(row["chosen"].split(" ")[: 3 * (i % 5)])
        for i, row in enumerate(rows)
    ]
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in begun))
    values = {
        "tag": "test",
        "base_out_path": directory,
        "devices_per_node": 1,
        "device": "cpu",
        "dtype": "fp32",
        "gbs": 8,
        "mbs": 8,
        "run_steps": 3,
        "num_warmup_steps": 0,
        "actor__model_path": models / "actor",
        "actor__learning_rate": 1e-3,
        "actor__weight_decay": 0.1,
        "critic__model_path": models / "reward",
        "critic__learning_rate": 1e-3,
        "dataset__path": [str(prompts)],
        "generation__max_new_tokens": 16,
        "generation__top_k": 1,
    } | changes
    flags = [
        f"{name.replace('__', '.')}={json.dumps(value) if isinstance(value, list) else value}"
        for name, value in values.items()
    ]
    text = layers.dump(layers.resolve(environ={}, flags=flags))
    (directory / "settings.yaml").write_text(text, encoding="utf-8")


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What the job script, torchrun or the local launcher tell a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": THREADS,
    }


def meeting_port() -> AbstractContextManager[int]:
    """A port for ranks to meet at, another one each time.

    Whatever a test leaves behind, ranks of the next one meet elsewhere.
    """
    wanted = 61000 + (os.getpid() * 101 + next(_turn)) % 4500
    return rendezvous_port(wanted, keep=False, seed=threading.get_native_id())


@contextmanager
def running(
    directory: Path,
    ranks: int = 1,
    port: int | None = None,
    **environ: str,
) -> Iterator[list[Any]]:
    """The processes of a run while it goes on; leaving the context ends those that still do."""
    with meeting_port() as free:
        processes = []
        for rank in range(ranks):
            own = variables(rank, ranks, port or free) | environ
            target = (directory, own, str(_log(directory, rank)))
            processes.append(_processes.Process(target=_rank, args=target))
        try:
            for process in processes:
                process.start()
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.join()


def finish(directory: Path, processes: list[Any]) -> Run:
    """Wait until all ranks have ended by themselves; one that hangs has no code."""
    deadline = time.monotonic() + _LIMIT
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    logs = [_log(directory, rank) for rank in range(len(processes))]
    codes = [process.exitcode for process in processes]
    return Run(directory, codes, [log.read_bytes().decode() for log in logs])


def wait_for(condition: Callable[[], Any], processes: list[Any]) -> None:
    """Wait until `condition` holds, while the processes live."""
    deadline = time.monotonic() + 120
    while not condition():
        assert all(process.is_alive() for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def train(directory: Path, ranks: int = 1, port: int | None = None, **environ: str) -> Run:
    """Run the ranks to their end."""
    with running(directory, ranks, port, **environ) as processes:
        return finish(directory, processes)


def together(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a test module returns on each of several ranks that have met."""
    results = _processes.Queue()
    with meeting_port() as port:
        processes = [
            _processes.Process(
                target=_call, args=(variables(rank, ranks, port), function, arguments, results)
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            found = {}
            for _ in processes:
                rank, failure, found[rank] = pickle.loads(results.get(timeout=_LIMIT))
                assert not failure, failure
            return [found[rank] for rank in range(ranks)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _call(
    environ: dict[str, str], function: Callable[..., Any], arguments: Any, results: Any
) -> None:
    os.environ.update(environ)
    rank = int(environ["RANK"])
    import tiny
    import torch

    from hlrlhf.trainer.models import engine

    torch.set_num_threads(int(THREADS))
    try:
        engine.start(tiny.cpu(tiny.settings()), tiny.settings())
        found = (rank, "", function(*arguments))
    except Exception:
        found = (rank, traceback.format_exc(), None)
    # As bytes: tensors would be passed on as handles of this process, which is about to end.
    results.put(pickle.dumps(found))


def _log(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.log"


def _rank(directory: Path, environ: dict[str, str], log: str) -> None:
    os.environ.update(environ)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    # A forked process does not read it again.
    sys.path[:0] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    import torch

    torch.set_num_threads(int(THREADS))
    sys.argv[1:] = [str(directory)]
    runpy.run_module("hlrlhf.trainer", run_name="__main__", alter_sys=True)
