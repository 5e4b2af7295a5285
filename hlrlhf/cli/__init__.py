"""The command line: one module per command.

Data goes to standard output and words to standard error. Exit codes: 0 done, 1 the run or job
failed, 2 bad usage or settings or a job that Slurm refuses, 3 Slurm could not be reached.
"""

from __future__ import annotations

import gc
import io
import sys


def main() -> None:
    """Run the command line of this process and end it."""
    # Starting makes many objects and hardly any garbage: looking for it costs a tenth of the time.
    gc.set_threshold(100_000)
    from hlrlhf.cli.app import app
    from hlrlhf.errors import HlrlhfError, shortened

    # Scripts and files are UTF-8, whatever the terminal's encoding; names of files may be no text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        app()
    except HlrlhfError as error:
        from hlrlhf.settings.errors import printable

        for line in str(error).splitlines():
            print(f"hlrlhf: {printable(shortened(line))}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        # Else the interpreter, as it ends, searches all of it once more: a sixth of the time.
        gc.freeze()
