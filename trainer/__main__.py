"""One rank: ``python -m hlrlhf.trainer RUN_DIRECTORY``.

RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which one, as torchrun sets them.
Exits with 0 when the run is complete, with 75 when it stopped after a warning (SIGUSR1) with its
models saved, and with 1 when it failed. Where HLRLHF_EXIT_FILE names a file, the first rank with
such a code leaves it there, and a stop exits with 0: a launcher that ends all ranks when one exits
with another code would end those that are still about to leave.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from hlrlhf.settings import SettingsError
from hlrlhf.settings.layers import load
from hlrlhf.trainer.errors import TrainerError

# Known to batch systems as "temporary failure, try again" (EX_TEMPFAIL of sysexits.h).
STOPPED_EARLY = 75


def main(arguments: list[str]) -> int:
    """Run one rank; returns the exit code.

    Args:
        arguments: the run directory.

    Raises:
        TrainerError: the run cannot go on.
        SettingsError: its settings.yaml cannot be used.
    """
    if len(arguments) != 1:
        raise TrainerError("usage: python -m hlrlhf.trainer RUN_DIRECTORY")
    received: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    run = Path(arguments[0]).absolute()
    settings = load(run / "settings.yaml")
    try:
        local_rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as error:
        raise TrainerError(
            f"{error.args[0]} is not set: ranks are started by the job script, by "
            "`hlrlhf submit --local` or by torchrun"
        ) from error
    if world_size != settings.world_size:
        raise TrainerError(
            f"WORLD_SIZE = {world_size}, but the run has num_nodes x devices_per_node = "
            f"{settings.world_size} ranks"
        )
    # Here rather than above: imports take seconds, in which a warning must find its handler.
    from hlrlhf.trainer import device as devices

    device = devices.select(settings, local_rank)
    _quieten()
    # DeepSpeed looks for its accelerator when it is imported: only now does the device stand.
    from hlrlhf.trainer import engine, loop

    engine.start(device)
    complete = loop.train(settings, run, device, lambda: bool(received))
    return 0 if complete else STOPPED_EARLY


def _quieten() -> None:
    """Keep the libraries' bars and their warnings to each other out of the log."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # They call each other by names that are about to change.
    warnings.filterwarnings("ignore", category=FutureWarning)


def _leave(code: int) -> NoReturn:
    file = os.environ.get("HLRLHF_EXIT_FILE")
    if file and code:
        with contextlib.suppress(OSError), Path(file).open("x", encoding="ascii") as first:
            first.write(f"{code}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: with peers that wait in a collective, the communication library's own clean-up
    # can keep a failed rank alive, and the job with it.
    os._exit(0 if file and code == STOPPED_EARLY else code)


if __name__ == "__main__":
    try:
        outcome = main(sys.argv[1:])
    except (TrainerError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        outcome = 1
    except Exception:
        traceback.print_exc()
        outcome = 1
    _leave(outcome)
