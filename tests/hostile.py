"""Runs whose every value is hostile: rendered, run by bash, and what reached the trainer compared.

All values try to run ``canary`` or to make a file ``pwned``. A run is either refused, in words on
lines of their own, or each value is where it belongs, byte for byte, and no canary has sung.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from hlrlhf.settings import Resolved, Settings, SettingsError, layers, paths, resolve
from hlrlhf.settings.names import settings_by_name
from hlrlhf.slurm import script

# What a shell, Slurm, Jinja, YAML or a terminal might take for something else.
TRICKS = (
    *("'", '"', "\\", "$(canary)", "`canary`", ";canary;", "|canary|", "&canary&", "\\$(canary)"),
    *("$(touch pwned)", "`touch pwned`", ">pwned", "'$(canary)'", '"$(canary)"', "'\\''", "${IFS}"),
    *("<(canary)", "$((a[$(canary)]))", "a[$(canary)]", "!x", "*", "?[a]", "~", "$'\\n'", "(", ")"),
    *("%j", "%%", "%", "#", " # ", "-", "--", "--wrap=canary", "-n1", "..", "../..", ".", "="),
    *(" ", "  ", "{{ 7 * 7 }}", "{% raw %}", "{#", "é世🙂", "\u202e", "\u200f", "x", "HOME", "&x"),
    *("[", "]", "{", "}", ":", ",", "|", "@", "+", "^", "null", "\ufeff"),
)
# What no script can hold.
UNFIT = ("\n", "\ncanary\n", "\n#SBATCH --wrap=canary\n", "\0", "\r", "\x1b[31m", "\t", "\x7f")
UNFIT += ("\x85", "\u2028", "\u2029", "\udcff", "\udc80\udcfe", "'\ncanary #", "\\\ncanary")
LONG = 100_000
DEVICES = ("cpu", "cuda", "hpu")
CONTAINERS = ("none", "none", "apptainer", "docker", "pyxis")
# Code of the site's own, and what is chosen apart.
APART = {"tag", "base_out_path", "device", "slurm.template", "slurm.extra", "slurm.srun_args"} | {
    *("environment.setup", "environment.python", "log_file"),
    *("container.kind", "container.image", "container.mounts", "container.args"),
    # Of so narrow a form that a hostile text is none.
    *("reward.function", "slurm.time", "slurm.mem", "slurm.mem_per_cpu", "slurm.mem_per_gpu"),
}
DIRECTIVES = ("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist")
DIRECTIVES += ("mail_type", "mail_user", "comment", "dependency")
# What libraries read, and what a node's own environment holds.
INHERITED = ("HF_HOME", "HF_TOKEN", "OMP_NUM_THREADS", "SLURMD_NODENAME", "SLURM_JOB_GPUS")
INHERITED += ("HABANA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "https_proxy", "HOME", "TMPDIR")

# Writes its words down, and a word that no value can be: that was one call.
_NOTE = """note() { printf '%s\\0' "$@" '\n' >>"$CALLS"; }"""
_SCRIPTS = {
    "canary": ': >"$CANARY"',
    "scontrol": "echo first",
    "scancel": "",
    "hl-smi": "printf '%s\\n' 'index, module_id' '0, 4' '1, 6'",
    "srun": 'note srun "$@"\nwhile :; do case $1 in -*) shift ;; *) break ;; esac; done\nexec "$@"',
    **dict.fromkeys(
        ("apptainer", "docker"),
        'note "${0##*/}" "$@"\n[ -e "$CALLS.env" ] || exec env -0 >"$CALLS.env"',
    ),
    "trainer": 'note python "$@" "$(pwd -P)"\necho printed\n'
    'printf \'0\\n\\n\' >"logs/$HLRLHF_JOB.$HLRLHF_ATTEMPT.rank"\nexec env -0 >"$CALLS.env"',
}


@dataclass
class Case:
    """A call of hlrlhf, and what stands in the job's own environment.

    Attributes:
        folder: of the case alone.
        wanted: the settings that were given, by dotted name.
        preset, files, environ, flags: the same, as `resolve` takes them.
        inherited: variables of the job.
    """

    folder: Path
    wanted: dict[str, Any]
    preset: str | None = None
    files: list[Path] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    inherited: dict[str, str] = field(default_factory=dict)

    def resolve(self) -> Resolved:
        """The settings of the call."""
        return resolve(self.preset, self.files, self.environ, self.flags)


def make_stand_ins(folder: Path) -> Path:
    """Write the commands that a script calls; they note their words and run what follows."""
    folder.mkdir(parents=True)
    for name, body in _SCRIPTS.items():
        file = folder / name
        file.write_text(f"#!/bin/sh\n{_NOTE}\n{body}\n")
        file.chmod(0o755)
    return folder


def text(rng: random.Random, *, unfit: bool = False, avoid: str = "", longest: int = LONG) -> str:
    """A hostile text.

    Args:
        rng: where it comes from.
        unfit: whether it may hold what no script can.
        avoid: characters that it does not hold.
        longest: its length at most; 100 kB now and then.
    """
    pieces = [*TRICKS, *UNFIT * 2] if unfit else TRICKS
    made = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
    if rng.random() < 0.01:
        made += "x" * LONG
    made = "".join(char for char in made if char not in avoid)
    return made[:longest] or "x"


def cases(folder: Path, seed: int, count: int) -> Iterator[Case]:
    """As many cases, each in a folder of its own."""
    rng = random.Random(seed)
    stand_ins = folder / "bin"
    for number in range(count):
        yield _case(rng, folder / str(number), stand_ins)


def _case(rng: random.Random, folder: Path, stand_ins: Path) -> Case:
    folder.mkdir()
    kind = rng.choice(CONTAINERS)
    container = kind != "none"
    # A backslash cannot be in the directory, nor what separates mounts in a path that is mounted.
    name = text(rng, avoid="/\\:," if container else "/\\", longest=60)
    base = folder / f"runs{name}"
    if rng.random() < 0.2:  # through a link, and around a corner
        (folder / "real").mkdir()
        base.symlink_to("real")
        base = base / "a" / ".." / "b"
    python = folder / f"bin{text(rng, avoid='/', longest=60)}"
    python.symlink_to(stand_ins / "trainer")
    wanted: dict[str, Any] = {
        "tag": rng.choice(("a", "A-._", "7")),
        "base_out_path": str(base),
        "device": rng.choice(DEVICES),
        "actor.model_path": _path(rng, container),
        "critic.model_path": _path(rng, container),
        "dataset.path": [_path(rng, container) for _ in range(rng.randint(1, 3))],
        "environment.python": text(rng) if kind in ("apptainer", "docker") else str(python),
        "container.kind": kind,
    }
    if container:
        wanted["container.image"] = text(rng)
        wanted["container.args"] = [f"--y={text(rng)}" for _ in range(rng.randint(0, 2))]
        wanted["container.mounts"] = [text(rng) for _ in range(rng.randint(0, 2))]
    if rng.random() < 0.3:
        wanted["log_file"] = str(folder / f"own{text(rng, avoid='/', longest=60)}" / "log")
    if rng.random() < 0.3:
        wanted["slurm.srun_args"] = [f"--x={text(rng)}" for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.2:
        wanted["slurm.extra"] = [f"--licenses={shlex.quote(text(rng, avoid=_SPLIT))}"]
    for setting in settings_by_name().values():
        if setting.name in APART or setting.name in wanted or setting.type not in _TEXTS:
            continue
        if rng.random() < 0.25:
            wanted[setting.name] = _value(rng, setting.name, container, folder)
    for name, other, value in _TOGETHER:
        if name in wanted:
            wanted.setdefault(other, value)
    if wanted["device"] != "hpu":
        wanted.pop("hpu.recipe_cache_path", None)
    # One value, of any kind of setting, that may not go through.
    if rng.random() < 0.25:
        setting = rng.choice([one for one in settings_by_name().values() if one.name not in _RUN])
        hostile = text(rng, unfit=True)
        if setting.name in _MADE:
            hostile = f"{folder}/o{hostile[:60].replace('/', '')}"
        wanted[setting.name] = [hostile] if setting.is_list else hostile
    case = Case(folder, wanted)
    _spread(rng, case)
    for variable in rng.sample(INHERITED, 4):
        case.inherited[variable] = text(rng, unfit=True).replace("\0", "")
    return case


# Commands of the site's own.
_RUN = ("environment.setup", "environment.python")
# Folders that the run, or its script, makes.
_MADE = ("base_out_path", "log_file", "tensorboard_path", "checkpoint_path")
_MADE += ("hpu.recipe_cache_path",)
_TEXTS = ("text", "list of text")
# Of a setting that would have no effect alone, what makes it have one.
_TOGETHER = (
    ("evaluation.path", "evaluation.interval", "1"),
    ("pretraining.column", "pretraining.path", "/x"),
    ("slurm.gres_type", "slurm.gres_name", "$(canary)"),
)
# sbatch splits the line of `slurm.extra` again, by rules of its own.
_SPLIT = "'\\#"


def _path(rng: random.Random, container: bool) -> str:
    return "/" + text(rng, avoid=":," if container else "")


def _value(rng: random.Random, name: str, container: bool, folder: Path) -> Any:
    allowed = settings_by_name()[name].allowed
    if allowed.startswith("one of "):
        return rng.choice(allowed.removeprefix("one of ").split(", "))
    if name == "generation.stop":
        return [text(rng, unfit=True).encode("utf-8", "replace").decode()]
    if name in _MADE:
        return str(folder / f"o{text(rng, avoid='/:,', longest=60)}")
    place = paths.places().get(name)
    if place is not None and place.kind in ("run", "model", "data"):
        return _path(rng, container)
    return text(rng)


def _spread(rng: random.Random, case: Case) -> None:
    """Give each setting in one of the ways that there are."""
    written: dict[str, dict[str, Any]] = {"preset.yaml": {}, "site.yaml": {}}
    for name, value in case.wanted.items():
        joined = value
        if isinstance(value, list):
            as_yaml = yaml.safe_dump(value, default_flow_style=True, default_style='"', width=1e9)
            joined = as_yaml.strip() if rng.random() < 0.5 else shlex.join(value)
        ways = ["file", "preset"]
        if "\0" not in joined:  # no variable or argument can hold it
            ways += ["environment", "flag"]
        way = "environment" if any("\ud800" <= c <= "\udfff" for c in joined) else rng.choice(ways)
        if way == "environment":
            case.environ[settings_by_name()[name].env] = joined.replace("\0", "")
        elif way == "flag":
            case.flags.append(f"{name}={joined}")
        else:
            written["site.yaml" if way == "file" else "preset.yaml"][name] = value
    for name, values in written.items():
        file = case.folder / name
        file.write_text(yaml.safe_dump(values, default_style='"', allow_unicode=rng.random() < 0.5))
    case.preset, case.files = str(case.folder / "preset.yaml"), [case.folder / "site.yaml"]


def refusal(error: SettingsError) -> None:
    """See that an error is words, a line for each problem, that no terminal obeys."""
    lines = str(error).split("\n")
    assert len(lines) == len(error.problems)
    assert all(line.isprintable() for line in lines)


def examine(case: Case, stand_ins: Path) -> str:
    """Take a case as far as it goes; ``refused`` or the kind of its container.

    Raises:
        AssertionError: a value is not where it belongs, or a canary has sung.
    """
    try:
        resolved = case.resolve()
        directory = Path(resolved.settings.base_out_path, resolved.settings.tag)
        rendered = script.render(resolved, directory, {"XDG_CACHE_HOME": str(stand_ins)})
        dumped = layers.dump(resolved)
    except SettingsError as error:
        refusal(error)
        return "refused"
    for name, value in case.wanted.items():
        given = resolved.values[name].value
        # Numbers are told from text elsewhere.
        if settings_by_name()[name].type in _TEXTS:
            expected = paths.absolute(name, value)
            assert given == (None if expected == "" else expected), name
    (directory / "logs").mkdir(parents=True)
    (directory / "settings.yaml").write_text(dumped, encoding="utf-8")
    assert layers.load(directory / "settings.yaml") == resolved.settings
    check_directives(rendered, resolved.settings, directory)
    calls, environ = _run(case, rendered, directory, stand_ins)
    settings = resolved.settings
    _check_calls(calls, settings, directory)
    _check_environment(environ, settings, case.inherited)
    if settings.log_file and settings.container.kind in ("none", "pyxis"):
        assert Path(settings.log_file).read_text(encoding="utf-8") == "printed\n"
    return settings.container.kind


def _run(
    case: Case, rendered: str, directory: Path, stand_ins: Path
) -> tuple[list[list[str]], dict[str, str]]:
    """Run a script as Slurm would; the words of each call, and the trainer's environment."""
    file, calls = directory / "job.sbatch", case.folder / "calls"
    file.write_text(rendered, encoding="utf-8")
    canary = stand_ins.with_name("canary")
    environ = {
        **case.inherited,
        "PATH": f"{stand_ins}:/usr/bin:/bin",
        "CALLS": str(calls),
        "CANARY": str(canary),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
    }
    done = subprocess.run(
        ["bash", str(file)], cwd=directory, env=environ, capture_output=True, check=False
    )
    assert not canary.exists(), "a canary has sung"
    for _, folders, files in os.walk(case.folder):
        assert "pwned" not in [*folders, *files]
    assert calls.exists(), done.stderr.decode(errors="replace")
    noted = [
        call.split("\0")
        for call in calls.read_bytes().decode(errors="surrogateescape").split("\0\n\0")
        if call
    ]
    entries = Path(f"{calls}.env").read_bytes().decode(errors="surrogateescape").split("\0")
    pairs = (entry.partition("=") for entry in entries if entry)
    return noted, {name: value for name, _, value in pairs}


def _check_calls(calls: list[list[str]], settings: Settings, directory: Path) -> None:
    """What srun, the container and the trainer were called with."""
    kind, container = settings.container.kind, settings.container
    runs = "python" if kind in ("none", "pyxis") else kind
    # In the end, those containers are looked for that are left.
    expected = ["srun", runs] * (2 if kind == "docker" else 1)
    assert [call[0] for call in calls] == expected
    step, inner = calls[:2]
    options = step[: step.index("bash")]
    after = options.index("--kill-on-bad-exit=1") + 1
    given = settings.slurm.srun_args
    assert options[after : after + len(given)] == given
    trainer = ["-m", "hlrlhf.trainer", str(directory)]
    if kind in ("none", "pyxis"):
        # The last word is the directory that the trainer was started in.
        assert inner == ["python", *trainer, os.path.realpath(directory)]
    else:
        assert inner[-5:] == [container.image, settings.environment.python, *trainer]
    if kind == "none":
        return
    outer = options if kind == "pyxis" else inner[:-5]
    assert outer[len(outer) - len(container.args) :] == container.args
    models = [settings.actor.model_path, settings.critic.model_path, *settings.dataset.path]
    there = [str(directory), *(path for path in models if path.startswith("/"))]
    mounts = [f"{path}:{path}" for path in there] + container.mounts
    if kind == "pyxis":
        assert f"--container-image={container.image}" in options
        assert f"--container-workdir={directory}" in options
        (mounted,) = [word for word in options if word.startswith("--container-mounts=")]
        assert all(mount in mounted for mount in mounts)
        return
    option = {"apptainer": "--bind", "docker": "--volume"}[kind]
    assert {*mounts} <= {after for before, after in pairwise(outer) if before == option}


def _check_environment(
    environ: dict[str, str], settings: Settings, inherited: dict[str, str]
) -> None:
    """What the trainer, or the client of its container, has."""
    assert environ["MASTER_ADDR"] == (settings.master_addr or "first")
    libraries = {"hpu": ("HCCL", "GLOO"), "cuda": ("NCCL", "GLOO"), "cpu": ("GLOO",)}
    if settings.network_interface:
        for library in libraries[settings.device]:
            assert environ[f"{library}_SOCKET_IFNAME"] == settings.network_interface
    if settings.device == "hpu" and settings.hpu.recipe_cache_path:
        assert environ["HLRLHF_RECIPE_CACHE"] == settings.hpu.recipe_cache_path
    for name, value in inherited.items():
        if value or name != "OMP_NUM_THREADS":
            assert environ[name] == value, name


def check_directives(rendered: str, settings: Settings, directory: Path) -> None:
    """What sbatch reads, up to the first command, is what was set and nothing else."""
    found: list[str] = []
    for line in rendered.split("\n"):
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found += slurm_words(line.removeprefix("#SBATCH"))
    expected = [f"--chdir={directory}", f"--job-name={directory.name}"]
    expected += [f"--output={str(directory).replace('%', '%%')}/logs/%j.batch.log"]
    for name in DIRECTIVES:
        value = getattr(settings.slurm, name)
        expected += [] if value is None else [f"--{name.replace('_', '-')}={value}"]
    expected += [word for line in settings.slurm.extra for word in slurm_words(line)]
    assert not Counter(expected) - Counter(found), Counter(expected) - Counter(found)
    own = ("--nodes=", "--ntasks-per-node=", "--gres=", "--open-mode=", "--no-requeue")
    own += ("--requeue", "--kill-on-invalid-dep=", "--cpus-per-task=", "--time=", "--mem")
    own += ("--exclusive", "--signal=")
    assert all(word.startswith(own) for word in Counter(found) - Counter(expected))


def slurm_words(line: str) -> list[str]:
    """How sbatch splits an #SBATCH line, after its own reader."""
    words: list[str] = []
    word: str | None = None
    quote = ""
    characters = iter(line)
    for char in characters:
        if char == "\\":
            word = (word or "") + next(characters)
        elif quote:
            if char == quote:
                quote = ""
            else:
                word = (word or "") + char
        elif char in "'\"":
            quote, word = char, word or ""
        elif char == "#":
            break
        elif char.isspace():
            words += [word] if word is not None else []
            word = None
        else:
            word = (word or "") + char
    assert not quote
    return words + ([word] if word is not None else [])
