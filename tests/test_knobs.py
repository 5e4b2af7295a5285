"""Every setting that the trainer reads has a test that shows what it changes.

Such a test names its settings in a mark, `@pytest.mark.knob("ppo.gamma")`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from hlrlhf.settings.names import settings_by_name

# Read by the tool, before there is a trainer: tested with the script, the runs and the launchers.
TOOL_GROUPS = ("slurm.", "container.", "environment.")
TOOL = {
    "tag",
    "base_out_path",
    "num_nodes",
    "master_port",
    "master_addr",
    "network_interface",
    "log_file",
    "hpu.recipe_cache_path",
    "hpu.recipe_cache_size",
}


def marks(tree: ast.AST) -> Iterator[str]:
    """Arguments of every `pytest.mark.knob`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.knob":
            yield from (ast.literal_eval(argument) for argument in node.args)


def test_every_setting_of_the_trainer_has_a_test() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.rglob("test_*.py")]
    shown = {name for tree in trees for name in marks(tree)}
    settings = set(settings_by_name())
    of_trainer = {name for name in settings - TOOL if not name.startswith(TOOL_GROUPS)}

    assert shown <= settings, "marks name settings that do not exist"
    assert of_trainer <= shown, "settings that no test shows at work"
