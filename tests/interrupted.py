"""A reward function that draws random numbers, and does to its run what the environment asks for.

``INTERRUPT`` says at which call, by whose rank, and what: ``3:0:kill:FOLDER`` ends the run once a
folder is there; ``3:0:warn`` warns it; ``3:0:sample`` does in the middle of the next rollout;
``3:1:limit`` lets the rank write no file longer than 4000
bytes from this call to the one after the next.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy
import torch

calls = 0


def score(prompts: list[str], answers: list[str]) -> list[float]:
    """Short answers are better, by and large."""
    global calls
    calls += 1
    at, rank, what, place = [*os.environ.get("INTERRUPT", "").split(":"), *[""] * 4][:4]
    if rank == os.environ["RANK"]:
        interrupt(calls - int(at), what, place)
    noise = [random.gauss() + numpy.random.normal() for _ in answers]
    return [x - len(answer) / 10 for x, answer in zip(noise, answers, strict=True)]


def interrupt(since: int, what: str, place: str) -> None:
    """Do it, `since` calls after it was asked for."""
    if what == "limit" and since in (0, 2):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000 if since == 0 else hard, hard))
    elif what == "warn" and since == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
    elif what == "sample" and since == 0:
        # Anywhere else, a model reads more of a text at once.
        torch.nn.modules.module.register_module_forward_pre_hook(warn_at_a_single_token)
    elif what == "kill" and since == 0:
        while not Path(place).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def warn_at_a_single_token(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Warn the run when a model reads the token that it has just sampled."""
    if isinstance(module, torch.nn.Embedding) and inputs[0].shape[-1] == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
