"""Settings from YAML: the traps of YAML 1.1, doubled keys, and where an error is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from mandatory import MANDATORY

from hlrlhf.settings import SettingsError, resolve
from hlrlhf.settings.yamlfile import Leaf, read


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "site.yaml"


def leaves(file: Path, text: str) -> dict[str, Leaf]:
    file.write_text(text, encoding="utf-8")
    return read(file)


def values(file: Path, text: str) -> dict[str, Any]:
    return {name: leaf.value for name, leaf in leaves(file, text).items()}


def refused(file: Path, text: str) -> list[str]:
    with pytest.raises(SettingsError) as error:
        leaves(file, text)
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize(
    "scalar",
    [
        *("24:00:00", "1:30", "2020-01-01", "0123", "0o17", "0x1f", "1_000", "1.10", "1e-5", "+1"),
        *("no", "yes", "on", "Off", "true", ".inf", "=", "<<", "nullable", "None"),
    ],
)
def test_a_plain_scalar_is_the_text_that_stands_there(file: Path, scalar: str) -> None:
    assert values(file, f"a: {scalar}\nb: [{scalar}]\n") == {"a": scalar, "b": [scalar]}


@pytest.mark.parametrize("scalar", ["", "~", "null", "Null", "NULL"])
def test_null(file: Path, scalar: str) -> None:
    assert values(file, f"a: {scalar}\nb: 1\n") == {"a": None, "b": "1"}


def test_quoted_null_is_text(file: Path) -> None:
    assert values(file, "a: 'null'\nb: \"~\"\nc: ''\n") == {"a": "null", "b": "~", "c": ""}


def test_nested_and_dotted_groups_with_their_lines(file: Path) -> None:
    text = "# mine\nactor:\n  dropout: 0.1\n\ncritic.dropout: 0.2\nlora: {dim: 8, alpha: 2}\n"
    assert leaves(file, text) == {
        "actor.dropout": Leaf("0.1", 3),
        "critic.dropout": Leaf("0.2", 5),
        "lora.dim": Leaf("8", 6),
        "lora.alpha": Leaf("2", 6),
    }


def test_lists_and_anchors(file: Path) -> None:
    text = "a: &m\n  - /x y\n  - '[z'\nb: *m\n"
    assert values(file, text) == {"a": ["/x y", "[z"], "b": ["/x y", "[z"]}


def test_empty_files_and_empty_groups_say_nothing(file: Path) -> None:
    assert leaves(file, "") == {}
    assert leaves(file, "# only a comment\n") == {}
    assert leaves(file, "actor: {}\n") == {}


def test_byte_order_mark_is_no_part_of_the_first_name(file: Path) -> None:
    assert values(file, "\ufeffseed: 1\n") == {"seed": "1"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nmbs: 2\nseed: 3\n", ":3: seed stands already on line 1"),
        ("actor:\n  dropout: 1\nactor.dropout: 2\n", ":3: actor.dropout stands already on line 2"),
        ("actor: {dropout: 1}\nactor: {dropout: 2}\n", ":2: actor.dropout stands already on"),
    ],
)
def test_doubled_keys(file: Path, text: str, problem: str) -> None:
    assert refused(file, text)[0].startswith(f"{file}{problem}")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("seed: 1\nactor: [1, 2\nmbs: 3\n", ":3:4: not YAML: "),
        ("seed: 1\n\tmbs: 2\n", ":2:1: not YAML: "),
        ("seed: @x\n", ":1:7: not YAML: "),
        ("seed: 'x\n", ":2:1: not YAML: "),
        ("a: 1\n--- \nb: 2\n", ":2:1: not YAML: "),
        ("a: *none\n", ":1:4: not YAML: "),
        ("a: !!python/object:os.system x\n", ":1:4: not YAML: "),
        ("b: 1\na: !!int x\n", ":2:4: not YAML: "),
        ("a: !mine x\n", ":1:4: not YAML: "),
        ("é: 1\nab: \x07\n", ":2:5: not YAML: '\\x07' is not allowed"),
        ("\x00", ":1:1: not YAML: '\\x00' is not allowed"),
        ("- seed\n", ":1: must be a mapping"),
        ("seed\n", ":1: must be a mapping"),
        ("a: 1\n? [x]\n: 1\n", ":2: a key must be a name"),
        ("a: &x [*x]\n", ":1:4: not YAML: "),
    ],
)
def test_line_and_column_of_what_cannot_be_read(file: Path, text: str, place: str) -> None:
    (problem,) = refused(file, text)
    assert problem.startswith(f"{file}{place}")


def test_what_is_within_itself(file: Path) -> None:
    assert "not YAML" in refused(file, "a: &x {b: *x}\n")[0]


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 50_000, "[" * 50 + "]" * 50])
def test_bottomless_files(file: Path, text: str) -> None:
    (problem,) = refused(file, "seed: 1\na: " + text)
    assert problem.startswith(f"{file}:2:")
    assert problem.endswith(": nested deeper than 50")


def test_a_value_that_is_deep_is_no_fault_of_the_file(file: Path) -> None:
    assert len(values(file, "a: " + "[" * 49 + "]" * 49)["a"]) == 1


def bomb(levels: int) -> list[str]:
    """Lines of ten aliases each of the line before."""
    names = "abcdefghij"[:levels]
    first = f"a: &a [{', '.join(['lol'] * 10)}]"
    return [first] + [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]"
        for before, name in itertools.pairwise(names)
    ]


def test_a_few_lines_that_stand_for_too_much(file: Path) -> None:
    (problem,) = refused(file, "\n".join(bomb(10)))
    assert problem.startswith(f"{file}:5:")
    assert problem.endswith(": longer than 262144 characters, with its aliases (*) written out")


def test_groups_that_stand_for_too_much(file: Path) -> None:
    lines = ["a: &a {x: 1, y: 2}"] + [
        f"{name}: &{name} {{x: *{before}, y: *{before}}}"
        for before, name in itertools.pairwise("abcdefghijklmnopqrstu")
    ]
    assert "with its aliases (*) written out" in refused(file, "\n".join(lines))[0]


def test_one_long_text_again_and_again(file: Path) -> None:
    lines = [f"a: &a {'x' * 1000}", f"b: [{', '.join(['*a'] * 300)}]"]
    assert refused(file, "\n".join(lines))[0].startswith(f"{file}:2:")


def test_aliases_of_aliases_within_reason(file: Path) -> None:
    assert len(values(file, "\n".join(bomb(3)))["c"][0]) == 10


def test_a_list_in_a_variable_that_stands_for_too_much() -> None:
    lists = [line.partition(": ")[2] for line in bomb(10)]
    with pytest.raises(SettingsError) as error:
        resolve(environ=MANDATORY | {"HL_DATASET_PATH": f"[{', '.join(lists)}]"})
    (problem,) = map(str, error.value.problems)
    assert problem.startswith("dataset.path = ")
    assert "longer than 262144 characters, with its aliases (*) written out" in problem


def test_a_list_in_a_variable_that_is_bottomless() -> None:
    with pytest.raises(SettingsError, match="nested deeper than 50"):
        resolve(environ=MANDATORY | {"HL_DATASET_PATH": "[" * 100_000})


def test_files_without_end(file: Path) -> None:
    assert values(file, "seed: 1\n#".ljust(2**18, "x")) == {"seed": "1"}
    longer = refused(file, "seed: 1\n#".ljust(2**18 + 1, "x"))
    assert longer == [f"{file}: is longer than 262144 characters"]
    with pytest.raises(SettingsError, match="/dev/zero: is longer"):
        read(Path("/dev/zero"))


def test_all_problems_of_a_file_at_once(file: Path) -> None:
    assert len(refused(file, "a: 1\na: 2\n? [x]\n: 1\na: 3\n")) == 3


def test_files_that_cannot_be_opened(file: Path) -> None:
    for path, reason in [
        (file.with_name("absent.yaml"), "No such file"),
        (file.parent, "Is a directory"),
    ]:
        with pytest.raises(SettingsError, match=f"{path}: cannot be read: {reason}"):
            read(path)
    file.write_bytes(b"a: \xff\n")
    with pytest.raises(SettingsError, match="not UTF-8 text"):
        read(file)
