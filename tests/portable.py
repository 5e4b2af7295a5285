"""The numeric tests as other machines would run them: `make test-portable`.

    python tests/portable.py [--only WORDS] [OPTIONS OF PYTEST]

Each profile holds the kernels of torch, oneDNN and MKL to the instructions of a kind of processor;
each runs with one thread and with four, and the demo's models come from other seeds too. A line for
each says what failed. `--only avx2` runs those whose name has these words; `--margins` tells how
narrowly comparisons held.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

# MKL heeds MKL_ENABLE_INSTRUCTIONS on Intel's processors alone, but MKL_CBWR=COMPATIBLE, which is
# SSE2, on all. torch's own kernels without AVX2 draw other random numbers too.
PROFILES = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "sse4_2": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}


@dataclass(frozen=True)
class Case:
    """One run of the tests."""

    profile: str
    threads: int
    seed: int

    def __str__(self) -> str:
        return f"{self.profile}, {self.threads} thread{'s'[: self.threads > 1]}, seed {self.seed}"

    def files(self) -> list[str]:
        """The tests that compute; for another seed of the demo's models, those that read them."""
        word = "" if self.seed == 1 else "demo_models"
        files = sorted((HERE / "trainer").rglob("test_*.py"))
        return [str(file) for file in files if word in file.read_text("utf-8")]

    def environ(self) -> dict[str, str]:
        """What makes the tests run so."""
        return PROFILES[self.profile] | {
            "HLRLHF_TEST_THREADS": str(self.threads),
            "HLRLHF_TEST_DEMO_SEED": str(self.seed),
            # Threads that wait for their turn on too few cores would take it from the others.
            "OMP_WAIT_POLICY": "PASSIVE",
            # Inductor would take what it has generated for another kind of processor.
            "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/inductor-{self.profile}",
        }

    def run(self, options: list[str]) -> bool:
        """Run the tests and tell in a line what failed; returns whether nothing did."""
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *self.files(), *options]
        done = subprocess.run(
            command,
            env=os.environ | self.environ(),
            cwd=HERE.parent,
            capture_output=True,
            text=True,
        )
        # 5: none of these files has a test that the options choose.
        good = done.returncode in (0, 5)
        *_, summary = done.stdout.splitlines() or [done.stderr]
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        print(f"{self}: {'; '.join([summary.strip('= '), *failed])}", flush=True)
        if not good:
            variables = " ".join(f"{name}={value}" for name, value in self.environ().items())
            print(done.stdout, done.stderr, f"again: {variables}", sep="\n", file=sys.stderr)
        if "--margins" in options:
            print(*re.findall(r"^.* of what is allowed .*$", done.stdout, re.MULTILINE), sep="\n")
        return good


CASES = [Case(profile, threads, 1) for profile in PROFILES for threads in (1, 4)]
CASES += [Case("native", 1, seed) for seed in (2, 3, 4)]


def lacking(profile: str) -> bool:
    """Whether this processor has not the instructions of a profile."""
    return profile != "native" and profile not in Path("/proc/cpuinfo").read_text("utf-8").split()


def main() -> None:
    """Run all cases; exits with 1 when a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="WORDS")
    own, options = parser.parse_known_args()
    good = True
    for case in CASES:
        if own.only not in str(case):
            continue
        if lacking(case.profile):
            print(f"{case}: this processor has no {case.profile}", flush=True)
        else:
            good &= case.run(options)
    sys.exit(not good)


if __name__ == "__main__":
    main()
