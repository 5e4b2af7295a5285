"""The picture of imports: who may know whom, see docs/architecture.md; no circle, no way back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TREE = Path(__file__).parents[1]
# A room, or a module that is its own, and what it may know besides `errors`.
MAY_KNOW = {
    "settings": set(),
    "slurm": {"settings"},
    "runs": {"settings"},
    "jobs": {"settings", "slurm", "runs"},
    "cli": {"settings", "slurm", "runs", "jobs"},
    "trainer.formulas": set(),
    "trainer.pieces": set(),
    "trainer.randomness": set(),
    "trainer.kernels": set(),
    "trainer.device": {"settings", "trainer.pieces", "trainer.randomness", "trainer.kernels"},
    "trainer.ranks": {"trainer.device"},
    "trainer.deadline": {"settings", "runs", "trainer.models"},
    "trainer.watchdog": {"settings"},
    "trainer.records": set(),
    "trainer.paths": {"settings"},
    "trainer.demo": set(),
    "trainer.data": {"settings"},
    "trainer.models": {"settings", "trainer.formulas", "trainer.device", "trainer.pieces"},
    "trainer.flops": {"trainer.models"},
    "trainer.lengths": {"settings", "trainer.data", "trainer.models"},
    "trainer.decoding": {
        *("settings", "trainer.models", "trainer.data"),
        *("trainer.device", "trainer.ranks", "trainer.kernels"),
    },
}
LOW = {"settings", "runs", "trainer.formulas", "trainer.device", "trainer.ranks"}
MAY_KNOW["trainer.ppo"] = LOW | {
    *("trainer.data", "trainer.models", "trainer.decoding", "trainer.flops", "trainer.lengths")
}
MAY_KNOW["trainer.saving"] = LOW | {
    *("trainer.models", "trainer.records", "trainer.pieces", "trainer.state")
}
MAY_KNOW["trainer.state"] = {
    *("trainer.formulas", "trainer.models", "trainer.decoding", "trainer.ppo")
}
MAY_KNOW["trainer.measures"] = LOW | {"trainer.models", "trainer.ppo", "trainer.flops"}
MAY_KNOW["trainer.metrics"] = LOW | {"trainer.models", "trainer.records"}


def imports() -> dict[str, set[str]]:
    """The modules of ours that each module names, by dotted name without ``hlrlhf.``."""
    places = [("", TREE / "hlrlhf"), ("trainer", TREE / "trainer")]
    files = {
        ".".join([*filter(None, [above]), *file.relative_to(folder).with_suffix("").parts]): file
        for above, folder in places
        for file in folder.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}

    def named(file: Path) -> Iterator[str]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hlrlhf"):
                module = (node.module or "").removeprefix("hlrlhf").strip(".")
                for alias in node.names:
                    whole = f"{module}.{alias.name}".strip(".")
                    yield whole if whole in files else module

    return {name: set(named(file)) - {name, ""} for name, file in files.items()}


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "trainer" else parts[0]


def test_each_room_knows_only_what_stands_below_it() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(module) in MAY_KNOW and room(other) != room(module)
        if room(other) not in {*MAY_KNOW[room(module)], "errors", "trainer.errors", "__init__"}
    ]
    assert wrong == []
    rooms = {room(module) for module in imports()}
    tops = {"__main__", "__init__", "errors", "trainer", "trainer.__main__", "trainer.loop"}
    assert rooms - MAY_KNOW.keys() <= tops | {"trainer.errors"}, "a room that nothing is said of"


def test_no_two_modules_know_each_other() -> None:
    left = imports()
    # Take away what knows nothing that is left, again and again: what remains goes in circles.
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}
