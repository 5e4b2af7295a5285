"""Hostile values in every setting, by the thousand; stops at the first that is not harmless.

    .venv/bin/python benchmarks/fuzz.py [SCRIPTS] [SEED]

Counts SCRIPTS scripts that bash has run, with stand-ins for srun, the containers and the trainer,
and what was refused on the way; see `tests/hostile.py`. Ten thousand take some minutes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import hostile


def main() -> None:
    """Run the cases, and print how many of each kind there were."""
    scripts = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        stand_ins = hostile.make_stand_ins(folder / "bin")
        for case in hostile.cases(folder, seed, sys.maxsize):
            try:
                counts[hostile.examine(case, stand_ins)] += 1
            except Exception:
                traceback.print_exc()
                sys.exit(f"case {counts.total()} of seed {seed}: {case}"[:5000])
            shutil.rmtree(case.folder)
            if counts.total() - counts["refused"] == scripts:
                break
    print(f"seed {seed}: {counts.total()} generated, {counts['refused']} refused, {scripts} run")
    for kind, count in sorted(counts.items()):
        print(f"{kind:10} {count}")


if __name__ == "__main__":
    main()
