"""The command line: one module per command.

Data goes to standard output and words to standard error. Exit codes: 0 done, 1 the run or job
failed, 2 bad usage or settings or a job that Slurm refuses, 3 Slurm could not be reached.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator


def main() -> None:
    """Run the command line of this process and end it."""
    # Starting makes many objects and hardly any garbage: looking for it costs a tenth of the time.
    gc.set_threshold(100_000)
    from hlrlhf.cli.app import app

    try:
        app()
    except Exception as error:
        code, lines = _explain(error)
        for line in lines:
            print(f"hlrlhf: {line}", file=sys.stderr)
        sys.exit(code)
    finally:
        # Else the interpreter, as it ends, searches all of it once more: a sixth of the time.
        gc.freeze()


def _explain(error: Exception) -> tuple[int, Iterator[str]]:
    """The exit code and the words for an error; what we did not foresee is raised again."""
    from hlrlhf.jobs.demo import DemoError
    from hlrlhf.runs import RunError
    from hlrlhf.settings.errors import SettingsError
    from hlrlhf.slurm.client import Rejected, SlurmError

    if isinstance(error, SettingsError):
        return 2, (str(problem) for problem in error.problems)
    for kind, code in ((RunError, 2), (DemoError, 1), (Rejected, 2), (SlurmError, 3)):
        if isinstance(error, kind):
            return code, iter(str(error).splitlines())
    raise error
