"""The batch script: what it says, and that no value can make it say anything else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import mandatory
import pytest
from cluster import LEAVE, Cluster, until, whole
from hostile import slurm_words
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hlrlhf.settings import SettingsError, resolve
from hlrlhf.slurm import script

GOLDEN = Path(__file__).parent / "golden"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
MANDATORY = mandatory.MANDATORY | {
    "HL_TAG": "golden",
    "HL_DATASET_PATH": "/data/one Hub/name",
}
IMAGES = {
    "none": "",
    "apptainer": "/images/gaudi.sif",
    "pyxis": "vault.habana.ai#gaudi-docker/1.21.0/pytorch:latest",
    "docker": "vault.habana.ai/gaudi-docker/1.21.0/pytorch:latest",
}
CASES = [
    (preset, container, nodes)
    for preset in ("bloom-1.1b-560m", "llama2-7b")
    for container in IMAGES
    for nodes in (1, 4)
]
# What a shell, Slurm or Jinja might take for something else.
HOSTILE = [
    "it's",
    '"; touch pwned; "',
    "$(touch pwned)",
    "`touch pwned`",
    "a # b",
    "%j %% %u",
    "back\\slash\\'\\",
    "  two  spaces  ",
    "naïve — 世界 🙂",
    "{{ 7 * 7 }}{% raw %}",
    "-n --comment=x",
    "!x *?[a]~ ${HOME} && | < > ;",
    "'\\''",
]


def render(
    flags: list[str] | None = None,
    directory: Path = Path("/runs/golden"),
    preset: str | None = None,
    environ: dict[str, str] | None = None,
) -> str:
    environ = environ or {}
    resolved = resolve(preset, environ=MANDATORY | environ, flags=flags or [])
    return script.render(resolved, directory, environ)


def problem(flags: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        render(flags, environ=environ)
    return str(caught.value)


# --- golden files


def golden_text(preset: str, container: str, nodes: int) -> str:
    batch = 8 * nodes * 4
    flags = [f"num_nodes={nodes}", f"gbs={batch}", "mbs=2"]
    if container != "none":
        flags += [f"container.kind={container}", f"container.image={IMAGES[container]}"]
    if nodes > 1:
        # The second half also shows what is left out by default.
        flags += [
            "slurm.partition=gaudi",
            "slurm.time=1-00:00:00",
            "slurm.cpus_per_task=10",
            "slurm.signal_lead=300",
            "slurm.requeue=true",
            "slurm.dependency=afterok:1",
            "slurm.extra=['--switches=1']",
            "network_interface=eth0",
            "hpu.lazy_mode=true",
            "hpu.recipe_cache_path=/scratch/recipes",
            "environment.setup=['module load gaudi']",
            "checkpoint_path=/saved",
        ]
    return render(flags, preset=preset)


@pytest.mark.parametrize(("preset", "container", "nodes"), CASES)
def test_golden(preset: str, container: str, nodes: int) -> None:
    """To write the files again after a change of the templates:

    GOLDEN=write pytest tests/slurm -k golden, then read the difference in git.
    """
    file = GOLDEN / f"{preset}-{container}-{nodes}.sbatch"
    text = golden_text(preset, container, nodes)
    if os.environ.get("GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_golden_folder_holds_nothing_else() -> None:
    expected = {f"{preset}-{container}-{nodes}.sbatch" for preset, container, nodes in CASES}
    assert {file.name for file in GOLDEN.iterdir()} == expected


def task_of(text: str) -> str:
    """The part that is in single quotes, where shellcheck does not look."""
    start = text.index("\ntask='\n") + len("\ntask='\n")
    return text[start : text.index("'\n", start)] + "\n"


def check_shell(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for part in (text, "#!/bin/bash\n" + task_of(text)):
        done = subprocess.run(
            [SHELLCHECK, "-"], input=part, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted(GOLDEN.iterdir()), ids=lambda file: file.stem)
def test_golden_files_pass_shellcheck(file: Path) -> None:
    check_shell(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("device", ["cuda", "cpu", "hpu"])
@pytest.mark.parametrize("container", IMAGES)
def test_every_device_passes_shellcheck(device: str, container: str) -> None:
    flags = [f"device={device}", "devices_per_node=4", "master_port=29600", "network_interface=ib0"]
    flags += ["master_addr=node1", "log_file=/logs/x.log"]
    if container != "none":
        flags += [f"container.kind={container}", f"container.image={IMAGES[container]}"]
    check_shell(render(flags))


# --- directives


def directives(text: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)


def test_unset_directives_are_left_out() -> None:
    assert directives(render(["slurm.gres_name="])) == [
        "--job-name=golden",
        "--nodes=1",
        "--ntasks-per-node=8",
        "--no-requeue",
        "--chdir=/runs/golden",
        "--output=/runs/golden/logs/%j.batch.log",
        "--open-mode=append",
    ]


@pytest.mark.parametrize(
    ("flag", "directive"),
    [
        ("slurm.partition=p", "--partition=p"),
        ("slurm.account=a", "--account=a"),
        ("slurm.qos=q", "--qos=q"),
        ("slurm.time=2-03:00:00", "--time=2-03:00:00"),
        ("slurm.gres_type=HL-225", "--gres=hpu:HL-225:8"),
        ("slurm.gres_name=gpu", "--gres=gpu:8"),
        ("device=cuda", "--gres=gpu:8"),
        ("slurm.constraint=a|b", "--constraint='a|b'"),
        ("slurm.reservation=r", "--reservation=r"),
        ("slurm.exclude=n[1-3]", "--exclude='n[1-3]'"),
        ("slurm.nodelist=n7", "--nodelist=n7"),
        ("slurm.exclusive=true", "--exclusive"),
        ("slurm.mem=0", "--mem=0"),
        ("slurm.mem_per_cpu=4G", "--mem-per-cpu=4G"),
        ("slurm.mem_per_gpu=64G", "--mem-per-gpu=64G"),
        ("slurm.cpus_per_task=12", "--cpus-per-task=12"),
        ("slurm.comment=two words", "--comment='two words'"),
        ("slurm.dependency=afterok:7", "--dependency=afterok:7"),
        ("slurm.dependency=afterok:7", "--kill-on-invalid-dep=yes"),
        ("slurm.requeue=true", "--requeue"),
        ("slurm.signal_lead=120", "--signal=B:USR1@120"),
        ("slurm.extra=['--switches=1@5']", "--switches=1@5"),
    ],
)
def test_directive(flag: str, directive: str) -> None:
    assert directive in directives(render([flag]))


def test_mail() -> None:
    found = directives(render(["slurm.mail_type=END,FAIL", "slurm.mail_user=me@example.org"]))
    assert {"--mail-type=END,FAIL", "--mail-user=me@example.org"} <= set(found)


def test_no_command_stands_before_a_directive() -> None:
    """Slurm stops reading directives at the first command."""
    before = golden_text("llama2-7b", "docker", 4).rpartition("#SBATCH")[0]
    assert all(line.startswith("#") for line in before.splitlines())


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)


@given(texts)
@example("back\\slash\\'\\")
@example("# '\"")
def test_sbatch_filter_round_trips(text: str) -> None:
    assert slurm_words(f"--comment={script.sbatch(text)}") == [f"--comment={text}"]


@pytest.mark.slurm
def test_slurm_takes_hostile_values_as_they_are(on_slurm: Cluster, tmp_path: Path) -> None:
    """In directives (the directory, the comment), as a log and as the command."""
    jobs = {}
    for number, text in enumerate(HOSTILE):
        # A backslash in a directory is refused, see below.
        directory = tmp_path / f"{number} {text.replace('/', '')}".replace("\\", "")
        (directory / "logs").mkdir(parents=True)
        python = directory / f"python {text.replace('/', '')}"
        python.write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\n')
        python.chmod(0o755)
        log = directory / f"log {text.replace('/', '')}"
        flags = [
            f"slurm.comment=<{text}>",
            f"environment.python={python}",
            "devices_per_node=1",
            "device=cpu",
            "master_addr=127.0.0.1",
        ]
        # Every other one with a log of its own.
        flags += [f"log_file={log}"] * (number % 2)
        file = directory / "job.sbatch"
        file.write_text(render(flags, directory), encoding="utf-8")
        job = on_slurm.run("sbatch", "--parsable", str(file)).strip()
        assert f"Comment=<{text}>" in on_slurm.run("scontrol", "show", "job", job)
        jobs[job] = directory, log if number % 2 else directory / "logs" / f"{job}.0.log"
    for job, (directory, log) in jobs.items():
        until(whole(directory / "logs" / f"{job}.0.exit"), f"the end of the job in {directory}")
        assert (directory / "logs" / f"{job}.batch.log").exists()
        assert log.read_text().splitlines()[:4] == [
            str(directory),
            "-m",
            "hlrlhf.trainer",
            str(directory),
        ]


# --- bash itself


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands that write down what they were called with, and run what follows the options."""
    folder = tmp_path_factory.mktemp("bin")
    write_down = 'printf "%s\\0" "${0##*/}" "$@" >>"$CALLS"\n'
    for name, rest in {
        "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
        "scontrol": "echo first; echo second",
        "scancel": "",
        "apptainer": "",
        "docker": "",
    }.items():
        file = folder / name
        file.write_text(f"#!/bin/bash\n{write_down if name != 'scontrol' else ''}{rest}\n")
        file.chmod(0o755)
    return folder


Run = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


@pytest.fixture(scope="module")
def run_script(stand_ins: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a script in bash as Slurm would; what it printed, and all words of all its calls."""

    def run(
        text: str, directory: Path, **environ: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        (directory / "logs").mkdir(parents=True, exist_ok=True)
        calls = tmp_path_factory.mktemp("calls") / "calls"
        calls.touch()
        file = calls.with_name("job.sbatch")
        file.write_text(text, encoding="utf-8")
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_PROCID": "3",
            "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "8",
        }
        path = f"{stand_ins}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(file)],
            cwd=calls.parent,
            env={"PATH": path, "CALLS": str(calls), **slurm, **environ},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        words = calls.read_text(encoding="utf-8").split("\0")
        assert not list(calls.parent.glob("pwned"))
        return done, words

    return run


def recorder(folder: Path, body: str = "") -> Path:
    """A stand-in for Python that writes down what it was called with and its environment."""
    file = folder / "python"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        '#!/bin/bash\nprintf "%s\\0" python "$@" >>"$CALLS"\n'
        f'export -p >"$CALLS.environ"; env -0 >"$CALLS.env"\n{LEAVE}{body}\nleave 0\n'
    )
    file.chmod(0o755)
    return file


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/:,"),
    min_size=1,
    max_size=30,
).filter(lambda name: name not in (".", ".."))


def hostile_examples(test: Callable[..., None]) -> Callable[..., None]:
    for text in HOSTILE:
        test = example(text.replace("/", "").replace(":", "").replace(",", ""))(test)
    return test


@hostile_examples
@given(names)
@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bash_takes_every_value_as_it_is(
    run_script: Run, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("run")
    directory = folder / f"run {text}".replace("\\", "")
    python = recorder(folder / f"bin{text}", "echo printed")
    flags = [
        f"environment.python={python}",
        "slurm.srun_args=['--x=" + text.replace("'", "''") + "']",
        f"slurm.comment={text}",
        f"master_addr={text}",
        f"network_interface={text}",
        f"log_file={folder}/own/{text}",
        "device=cpu",
    ]
    done, words = run_script(render(flags, directory), directory)
    assert done.returncode == 0, done.stderr
    assert f"--x={text}" in words
    assert (folder / "own" / text).read_text() == "printed\n"
    assert words[-5:] == ["python", "-m", "hlrlhf.trainer", str(directory), ""]
    assert (directory / "logs" / "7.0.exit").read_text() == "0\n"


@hostile_examples
@given(names)
@hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("container", ["apptainer", "docker", "pyxis"])
def test_containers_get_every_value_as_it_is(
    run_script: Run,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    container: str,
    text: str,
) -> None:
    # An image with the name of a file here would be taken for that file, ~ for the user's home.
    image = f"image{text}"
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    folder = tmp_path_factory.mktemp("run")
    directory = folder / f"run {text}".replace("\\", "")
    flags = [
        f"container.kind={container}",
        f"container.image={image}",
        "container.args=['--y=" + text.replace("'", "''") + "']",
        "container.mounts=['/m" + text.replace("'", "''") + ":/m']",
        f"hpu.recipe_cache_path={folder}/cache{text}",
        f"environment.python={recorder(folder)}",
        "evaluation.interval=1",
    ]
    paths = {
        "HL_ACTOR_MODEL_PATH": f"/actor{text}",
        "HL_ACTOR_TOKENIZER_PATH": f"/tokenizer{text}",
        "HL_EVALUATION_PATH": f"/eval{text}",
    }
    text_of_script = render(flags, directory, environ=paths)
    done, words = run_script(text_of_script, directory, NCCL_DEBUG="INFO", OTHER="x")
    # The stand-ins for containers start nothing.
    words_of_end = "" if container == "pyxis" else "without a word from the ranks"
    assert words_of_end in done.stderr
    assert done.returncode == bool(words_of_end), done.stderr
    trainer = ["-m", "hlrlhf.trainer", str(directory)]
    if container == "pyxis":
        mounts = next(word for word in words if word.startswith("--container-mounts="))
        assert f"/actor{text}:/actor{text}" in mounts
        assert f"/eval{text}:/eval{text}" in mounts
        assert f"/tokenizer{text}:/tokenizer{text}" in mounts
        assert f"/m{text}:/m" in mounts
        assert f"--container-image={image}" in words
    else:
        last = words[words.index(container) :]
        option = "--bind" if container == "apptainer" else "--volume"
        mounts = [after for before, after in pairwise(last) if before == option]
        assert f"/actor{text}:/actor{text}" in mounts
        assert f"/eval{text}:/eval{text}" in mounts
        assert f"/tokenizer{text}:/tokenizer{text}" in mounts
        assert f"{directory}:{directory}" in mounts
        place = last.index(image, last.index(f"--y={text}"))
        assert last[place + 1 : place + 5] == [str(folder / "python"), *trainer]
    assert f"--y={text}" in words


def test_docker_gets_ranks_devices_and_the_named_variables_only(
    run_script: Run, tmp_path: Path
) -> None:
    text = render(["container.kind=docker", "container.image=img"], tmp_path)
    _, words = run_script(text, tmp_path, NCCL_DEBUG="INFO", SECRET="x", HF_HOME="/hf")
    docker = words[words.index("docker") :]
    docker = docker[: docker.index("img")]
    passed = {after for before, after in pairwise(docker) if before == "--env"}
    assert {"RANK", "MASTER_ADDR", "MASTER_PORT", "NCCL_DEBUG", "HF_HOME"} <= passed
    assert {"HABANA_VISIBLE_DEVICES=all", "PT_HPU_LAZY_MODE"} <= passed
    assert not {"SECRET", "PATH"} & passed
    for option in ("--rm", "--runtime=habana", "--net=host", "--ipc=host", "--cap-add=sys_nice"):
        assert option in docker
    assert f"{os.getuid()}:{os.getgid()}" in docker


@pytest.mark.parametrize(("given", "expected"), [("2,3", '"device=2,3"'), ("", "all")])
def test_docker_gets_the_jobs_gpus(
    run_script: Run, tmp_path: Path, given: str, expected: str
) -> None:
    flags = ["container.kind=docker", "container.image=img", "device=cuda"]
    _, words = run_script(render(flags, tmp_path), tmp_path, SLURM_JOB_GPUS=given)
    assert words[words.index("--gpus") + 1] == expected


def environment(words_file: str) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in words_file.split("\0") if entry)
    return {name: value for name, _, value in pairs}


def ranks_environment(
    run_script: Run, folder: Path, flags: list[str], **environ: str
) -> tuple[dict[str, str], str]:
    python = recorder(folder, f'env -0 >"{folder}/env"')
    text = render([*flags, f"environment.python={python}"], folder)
    done, _ = run_script(text, folder, **environ)
    assert done.returncode == 0, done.stderr
    return environment((folder / "env").read_text(encoding="utf-8")), done.stderr


def test_the_ranks_environment(run_script: Run, tmp_path: Path) -> None:
    found, _ = ranks_environment(
        run_script, tmp_path, [], SLURM_RESTART_COUNT="2", SLURM_CPUS_PER_TASK="5"
    )
    assert {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "first",
        "HLRLHF_ATTEMPT": "2",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "5",
        "PT_HPU_LAZY_MODE": "0",
    }.items() <= found.items()
    assert not any(name.endswith("_SOCKET_IFNAME") for name in found)
    assert (tmp_path / "logs" / "7.2.exit").read_text() == "0\n"


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("hpu", {"HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}),
        ("cuda", {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}),
        ("cpu", {"GLOO_SOCKET_IFNAME"}),
    ],
)
def test_network_interface(
    run_script: Run, tmp_path: Path, device: str, expected: set[str]
) -> None:
    flags = [f"device={device}", "network_interface=ib0"]
    found, _ = ranks_environment(run_script, tmp_path, flags)
    assert {name for name in found if name.endswith("_IFNAME")} == expected


def test_lazy_mode_and_recipe_cache(run_script: Run, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = ["hpu.lazy_mode=true", f"hpu.recipe_cache_path={cache}"]
    found, _ = ranks_environment(run_script, tmp_path, flags)
    assert found["PT_HPU_LAZY_MODE"] == "1"
    assert found["PT_HPU_ENABLE_LAZY_COLLECTIVES"] == "true"
    assert found["PT_HPU_RECIPE_CACHE_CONFIG"] == f"{cache}/1,false,4096,false"
    assert (cache / "1").is_dir()


@pytest.mark.parametrize(
    ("environ", "modules", "warned"),
    [
        ({"HABANA_VISIBLE_DEVICES": "1,3"}, "6,2", False),
        ({"SLURM_STEP_GPUS": "0,2"}, "4,0", False),
        ({"HABANA_VISIBLE_MODULES": "5,7", "SLURM_STEP_GPUS": "0,2"}, "5,7", False),
        ({}, "4,6", True),
    ],
)
def test_modules_of_a_part_of_a_node(
    run_script: Run,
    stand_ins: Path,
    tmp_path: Path,
    environ: dict[str, str],
    modules: str,
    warned: bool,
) -> None:
    hl_smi = stand_ins / "hl-smi"
    hl_smi.write_text(
        "#!/bin/bash\nprintf '%s\\n' 'index, module_id' '0, 4' '1, 6' '2, 0' '3, 2'\n"
    )
    hl_smi.chmod(0o755)
    try:
        found, _ = ranks_environment(
            run_script, tmp_path, ["devices_per_node=2"], **{"SLURM_LOCALID": "0"} | environ
        )
    finally:
        hl_smi.unlink()
    assert found["HABANA_VISIBLE_MODULES"] == modules
    log = (tmp_path / "logs" / "7.0.log").read_text()
    assert ("does not say which" in log) is warned


def test_setup_lines_run_first_and_verbatim(run_script: Run, tmp_path: Path) -> None:
    setup = ['export SITE="$UNSET and $(echo more)"', "export HF_HOME=/hf"]
    found, _ = ranks_environment(run_script, tmp_path, [f"environment.setup={setup!r}"])
    assert found["SITE"] == " and more"
    assert found["HF_HOME"] == "/hf"


def test_exit_code_is_kept(run_script: Run, tmp_path: Path) -> None:
    text = render([f"environment.python={recorder(tmp_path, 'leave 75 warned')}"], tmp_path)
    done, _ = run_script(text, tmp_path)
    assert done.returncode == 75
    assert (tmp_path / "logs" / "7.0.exit").read_text() == "75\nwarned\n"


@pytest.mark.parametrize(
    ("setup", "named"),
    [
        (["module() { return 3; }", "module load gaudi"], "code 3: module load gaudi"),
        (["true", "cd /nowhere/at/all"], "code 1: cd /nowhere/at/all"),
        (["exit 0"], "environment.setup ended the job"),
    ],
    ids=["a command", "a builtin", "an exit"],
)
def test_a_failing_setup_line_stops_the_job_and_is_named(
    run_script: Run, tmp_path: Path, setup: list[str], named: str
) -> None:
    done, words = run_script(render([f"environment.setup={setup!r}"], tmp_path), tmp_path)
    assert done.returncode == 1
    assert named in done.stderr
    assert "srun" not in words
    said = (tmp_path / "logs" / "7.0.exit").read_text().splitlines()
    assert said[0] == "1"
    assert named in said[1]


def test_what_setup_lines_set_does_not_change_how_a_run_ends(
    run_script: Run, tmp_path: Path
) -> None:
    """Options of the shell, functions, and a trap for their own end, which is kept."""
    setup = [
        "set -euC -o pipefail",
        "fail() { exit 0; }; finish() { exit 0; }",
        f"trap 'echo cleaned >>{tmp_path}/theirs' EXIT",
        "why=nothing; attempt=9; cd /",
    ]
    lines = "[" + ", ".join(json.dumps(line) for line in setup) + "]"
    for body, code in (("leave 0", 0), ("exit 0", 1), ("leave 75 warned", 75)):
        shutil.rmtree(tmp_path / "logs", ignore_errors=True)
        python = recorder(tmp_path, body)
        flags = [f"environment.python={python}", f"environment.setup={lines}"]
        done, _ = run_script(render(flags, tmp_path), tmp_path)
        assert done.returncode == code, done.stderr
        assert (tmp_path / "logs" / "7.0.exit").read_text().startswith(f"{code}\n")
    assert (tmp_path / "theirs").read_text() == "cleaned\n" * 3


def test_a_signal_in_setup_is_not_setups_fault(run_script: Run, tmp_path: Path) -> None:
    done, words = run_script(render(["environment.setup=['kill -TERM $$']"], tmp_path), tmp_path)
    assert done.returncode == 128 + signal.SIGTERM
    assert "srun" not in words
    said = (tmp_path / "logs" / "7.0.exit").read_text()
    assert said == "143\nended by SIGTERM in environment.setup\n"


def test_a_code_that_is_no_signals_is_not_said_to_be_one(run_script: Run, tmp_path: Path) -> None:
    """As of a container whose image is missing."""
    python = recorder(tmp_path, "exit 255")
    done, _ = run_script(render([f"environment.python={python}"], tmp_path), tmp_path)
    assert done.returncode == 255
    said = (tmp_path / "logs" / "7.0.exit").read_text()
    assert re.fullmatch(r"255\nrank 3 on \S+ ended with exit code 255\n", said)


def test_a_word_that_a_full_disk_had_room_for(run_script: Run, tmp_path: Path) -> None:
    """See `Attempt.say`."""
    python = recorder(tmp_path, "ln -s 0 logs/$HLRLHF_JOB.$HLRLHF_ATTEMPT.rank; exit 0")
    done, _ = run_script(render([f"environment.python={python}"], tmp_path), tmp_path)
    assert done.returncode == 0


def test_what_may_fail_in_setup(run_script: Run, tmp_path: Path) -> None:
    """Inside of what a line runs or reads, in a condition, and where the line says so."""
    script = tmp_path / "activate"
    script.write_text("false\nexport ACTIVE=yes\n")
    setup = [
        f"source '{script}'",
        "f() { false; true; }",
        "f",
        "if false; then",
        "    exit 9",
        "fi",
        "false || true",
    ]
    lines = "[" + ", ".join(json.dumps(line) for line in setup) + "]"
    found, _ = ranks_environment(run_script, tmp_path, [f"environment.setup={lines}"])
    assert found["ACTIVE"] == "yes"


def test_no_success_without_a_word_from_the_ranks(run_script: Run, tmp_path: Path) -> None:
    """As after the loss of a node, when srun ends with 0."""
    python = recorder(tmp_path, "exit 0")
    done, _ = run_script(render([f"environment.python={python}"], tmp_path), tmp_path)
    assert done.returncode == 1
    assert "without a word" in done.stderr
    code, why = (tmp_path / "logs" / "7.0.exit").read_text().splitlines()
    assert code == "1"
    assert "without a word" in why


def test_a_rank_that_a_signal_ended(run_script: Run, tmp_path: Path) -> None:
    python = recorder(tmp_path, "kill -KILL $$")
    done, _ = run_script(render([f"environment.python={python}"], tmp_path), tmp_path)
    assert done.returncode == 128 + signal.SIGKILL
    code, why = (tmp_path / "logs" / "7.0.exit").read_text().splitlines()
    assert code == "137"
    assert re.match(r"rank 3 on \S+ was ended by SIGKILL", why)
    assert f"error: {why}" in (tmp_path / "logs" / "7.0.log").read_text()


def test_no_first_node_is_an_error(run_script: Run, stand_ins: Path, tmp_path: Path) -> None:
    scontrol = stand_ins / "scontrol"
    whole = scontrol.read_text()
    scontrol.write_text("#!/bin/bash\n")
    try:
        done, words = run_script(render([], tmp_path), tmp_path)
    finally:
        scontrol.write_text(whole)
    assert done.returncode == 1
    assert "HL_MASTER_ADDR" in done.stderr
    assert "srun" not in words
    assert (tmp_path / "logs" / "7.0.exit").read_text().startswith("1\nSlurm names no first node")


def test_a_directory_with_a_backslash_is_refused() -> None:
    with pytest.raises(SettingsError, match="backslash"):
        render(directory=Path("/runs/back\\slash"))


# --- the port


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port that someone listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_users_port_is_kept(run_script: Run, tmp_path: Path) -> None:
    found, _ = ranks_environment(run_script, tmp_path, ["master_port=23456"])
    assert found["MASTER_PORT"] == "23456"


def test_the_users_port_is_kept_or_the_job_fails(
    run_script: Run, tmp_path: Path, busy_port: int
) -> None:
    done, words = run_script(render([f"master_port={busy_port}"], tmp_path), tmp_path)
    assert done.returncode == 1
    assert f"HL_MASTER_PORT={busy_port} is taken" in done.stderr
    assert "srun" not in words


def outside_the_ephemeral_range(port: int) -> bool:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return 10000 <= port < low or high < port < 65536


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_default_port_gives_way_to_a_listener(
    run_script: Run, tmp_path: Path, family: socket.AddressFamily
) -> None:
    with contextlib.suppress(OSError), socket.create_server(("", 29500), family=family):
        pass
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # someone else listens: as good
            server.bind(("", 29500))
            server.listen()
        found, said = ranks_environment(run_script, tmp_path, [])
    port = int(found["MASTER_PORT"])
    assert port != 29500
    assert outside_the_ephemeral_range(port)
    assert f"using {port}" in said


@pytest.fixture
def claimed() -> Iterator[None]:
    """The default port belongs to a run that does not listen yet."""
    with Path("/proc/self/ns/net").open() as namespace:

        def claim() -> bool:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(namespace, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        until(claim, "the end of another run on this machine")
        yield


@pytest.mark.usefixtures("claimed")
def test_two_jobs_on_a_node_take_different_ports(run_script: Run, tmp_path: Path) -> None:
    """Before either of them listens."""
    ports = set()
    for job in ("7", "8"):
        found, _ = ranks_environment(run_script, tmp_path / job, [], SLURM_JOB_ID=job)
        ports.add(int(found["MASTER_PORT"]))
    assert len(ports) == 2
    assert all(map(outside_the_ephemeral_range, ports))


@pytest.mark.usefixtures("claimed")
def test_a_requeued_job_tries_another_port(run_script: Run, tmp_path: Path) -> None:
    ports = {
        ranks_environment(run_script, tmp_path, [], SLURM_RESTART_COUNT=count)[0]["MASTER_PORT"]
        for count in ("0", "1")
    }
    assert len(ports) == 2


@pytest.mark.usefixtures("claimed")
def test_nor_does_one_that_looks_there_first_take_what_is_claimed(
    run_script: Run, tmp_path: Path
) -> None:
    if not outside_the_ephemeral_range(29500):
        pytest.skip("the kernel hands out 29500 itself, so that no job looks there")
    first_look = {"SLURM_JOB_ID": "2785", "SLURM_RESTART_COUNT": "5"}
    assert 10000 + 2785 * 7 + 5 == 29500
    found, _ = ranks_environment(run_script, tmp_path, [], **first_look)
    assert found["MASTER_PORT"] != "29500"


# --- templates of a site


def site(folder: Path, text: str, name: str = "site.j2") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_site_template_overrides_a_block(tmp_path: Path) -> None:
    text = """{% extends "job.sbatch.j2" %}
{% block directives %}
{{ super() }}
#SBATCH --wckey={{ settings.tag | sbatch }}
{% endblock %}
"""
    # Called like ours, it still extends ours.
    for name in ("site.j2", "job.sbatch.j2"):
        rendered = render([f"slurm.template={site(tmp_path, text, name)}"])
        assert directives(rendered)[-1] == "--wckey=golden"
        assert directives(rendered)[:-1] == directives(render())
        check_shell(rendered)


def test_a_site_template_is_found_by_name(tmp_path: Path) -> None:
    site(tmp_path, '{% extends "job.sbatch.j2" %}{% block finish %}echo end\n{% endblock %}')
    environ = {script.SEARCH_PATH: f"/nowhere{os.pathsep}{tmp_path}"}
    assert "\necho end\n" in render(["slurm.template=site.j2"], environ=environ)


def test_a_sites_file_replaces_one_of_ours(tmp_path: Path) -> None:
    site(tmp_path, "export SITE=1\n", "environment_hpu.j2")
    assert "\nexport SITE=1\n" in render(environ={script.SEARCH_PATH: str(tmp_path)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ settings.tga | shell }}", "site.j2:2: 'hlrlhf.settings.schema.Settings object' has"),
        ("{{ nothing }}", "site.j2:2: 'nothing' is undefined"),
        ("{{ nothing | shell }}", "site.j2:2: 'nothing' is undefined"),
        ("{{ settings.tag }}", "site.j2:2: 'golden' is not quoted"),
        ("{{ settings.slurm.partition | shell }}", "site.j2:2: None is neither text nor a number"),
        ("{% if %}", "site.j2:2: Expected an expression"),
        ("{% include 'gone.j2' %}", "no 'gone.j2'"),
        ("{{ 1 + 'a' }}", "site.j2:2: unsupported operand"),
    ],
)
def test_a_wrong_template_is_one_clear_error(tmp_path: Path, text: str, words: str) -> None:
    file = site(
        tmp_path, '{% extends "job.sbatch.j2" %}{% block finish %}\n' + text + "{% endblock %}"
    )
    assert words in problem([f"slurm.template={file}"])


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    assert "no 'gone.j2'" in problem(["slurm.template=gone.j2"])
    assert "gone.j2" in problem([f"slurm.template={tmp_path}/gone.j2"])


def test_a_template_that_extends_itself(tmp_path: Path) -> None:
    site(tmp_path, '{% extends "site.j2" %}')
    found = problem(["slurm.template=site.j2"], {script.SEARCH_PATH: str(tmp_path)})
    assert "extends or includes itself" in found


def test_control_characters_are_refused() -> None:
    with pytest.raises(SettingsError, match="control character"):
        render(directory=Path("/runs/new\nline"))


@pytest.mark.parametrize("character", ":,")
def test_a_path_that_no_container_can_mount(character: str) -> None:
    flags = ["container.kind=docker", "container.image=x", f"actor.model_path=/a{character}b"]
    assert "actor.model_path" in problem(flags)
