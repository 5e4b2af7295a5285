"""A stand-in for Intel's bridge from PyTorch to Gaudi, where there is none.

It has the calls that DeepSpeed and the trainer make, under their real names, and records the ones
that matter in the file named by STAND_IN_CALLS, a line each. Work for ``hpu`` is done on the CPU.
"""

import os
from pathlib import Path


def record(call: str) -> None:
    """Note a call."""
    if "STAND_IN_CALLS" in os.environ:
        with Path(os.environ["STAND_IN_CALLS"]).open("a", encoding="utf-8") as calls:
            calls.write(f"{call}\n")
