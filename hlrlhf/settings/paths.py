"""Which settings are paths, and what a relative one is relative to.

A run is read again from other directories and on other nodes, so paths are made absolute once,
where the settings of a call come together.
"""

from __future__ import annotations

import os
from typing import Any

# Made by the run: always paths.
_OUTPUTS = {
    "base_out_path",
    "tensorboard_path",
    "log_file",
    "checkpoint_path",
    "hpu.recipe_cache_path",
}
# Read by the run: a path if it exists here or starts with ./ or ../, else a name (on the Hub, in a
# registry, on PATH). A name on the Hub has one slash at most and no suffix of a file of data.
ON_HUB = {
    "actor.model_path",
    "actor.tokenizer_path",
    "critic.model_path",
    "reference.model_path",
    "reward.model_path",
    "dataset.path",
    "pretraining.path",
    "evaluation.path",
}
_INPUTS = ON_HUB | {"container.image", "slurm.template", "environment.python"}
_DATA_FILES = (".json", ".jsonl", ".parquet", ".csv")


def absolute(name: str, value: Any) -> Any:
    """`value`, with ``~`` and the current directory filled in where setting `name` is a path."""
    if isinstance(value, list):
        return [absolute(name, item) for item in value]
    if not isinstance(value, str) or not value or name not in _OUTPUTS | _INPUTS:
        return value
    path = os.path.expanduser(value) if value.startswith("~") else value  # noqa: PTH111
    if name == "environment.python" and os.sep not in path:
        return path  # a command, even if a file here has the same name
    # A name never begins with a dot and a slash, so that may also be a path that is yet to be made.
    named = not path.startswith(("./", "../"))
    if name in ON_HUB:
        named = named and path.count("/") < 2 and not path.endswith(_DATA_FILES)
    if name in _OUTPUTS or not named or os.path.exists(path):  # noqa: PTH110 - Path raises on odd names
        return os.path.abspath(path)  # noqa: PTH100 - links stay; only dots go
    return path
