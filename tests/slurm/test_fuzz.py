"""Hostile values in all settings, by the hundred; by the thousand in `benchmarks/fuzz.py`."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import hostile
import pytest
from cluster import Cluster

from hlrlhf.settings import SettingsError
from hlrlhf.slurm import script

SEED = 7


def test_every_value_reaches_the_trainer_as_it_is_or_is_refused(tmp_path: Path) -> None:
    stand_ins = hostile.make_stand_ins(tmp_path / "bin")
    cases = hostile.cases(tmp_path, SEED, 300)
    counts = Counter(hostile.examine(case, stand_ins) for case in cases)
    assert counts.keys() == {"refused", *hostile.CONTAINERS}
    assert min(counts.values()) > 20


@pytest.mark.slurm
@pytest.mark.slow
def test_sbatch_reads_every_directive_as_it_is(on_slurm: Cluster, tmp_path: Path) -> None:
    """By its own list of what it was asked for; most of it this cluster refuses."""
    hostile.make_stand_ins(tmp_path / "bin")
    read = 0
    for case in hostile.cases(tmp_path, SEED, 400):
        # What sbatch itself finds wrong before it lists anything, such as files of nodes.
        unlisted = ("mail_type", "dependency", "nodelist", "exclude")
        case.flags += [f"slurm.{name}=" for name in unlisted]
        try:
            resolved = case.resolve()
            directory = Path(resolved.settings.base_out_path, resolved.settings.tag)
            text = script.render(resolved, directory, {"XDG_CACHE_HOME": str(tmp_path)})
        except SettingsError:
            continue
        file = case.folder / "job.sbatch"
        file.write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["sbatch", "-v", "--test-only", str(file)],
            env=on_slurm.environ,
            cwd=case.folder,
            capture_output=True,
            check=False,
        )
        said = done.stderr.decode()
        listed = dict(re.findall(r"^sbatch: (\S+) +: (.*)$", said, re.MULTILINE))
        assert listed, said[:2000]
        slurm = resolved.settings.slurm
        for name in ("partition", "account", "qos", "constraint", "comment", "mail-user"):
            value = getattr(slurm, name.replace("-", "_"))
            if value is not None:
                assert listed[name] == value
        assert listed["chdir"] == str(directory)
        read += 1
    assert read > 200
