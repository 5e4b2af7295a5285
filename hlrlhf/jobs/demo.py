"""The models and data of the demo preset, made where they are missing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib import resources
from pathlib import Path

from hlrlhf.errors import HlrlhfError
from hlrlhf.settings.layers import Resolved

MODELS = Path("demo", "models")


class DemoError(HlrlhfError):
    """The demo's models could not be made."""


def prepare(resolved: Resolved) -> None:
    """Make what the demo preset names, in the current directory, unless it is there.

    The maker runs in a process of its own, because it needs torch and this side must not.

    Args:
        resolved: the settings of a call; those of other presets, and a demo whose models are all
            replaced by the user's, need nothing.

    Raises:
        DemoError: the maker failed; its own words are on standard error.
    """
    settings = resolved.settings
    paths = [settings.actor.model_path, settings.critic.model_path, *settings.dataset.path]
    ours = any(Path(path).is_relative_to(MODELS.absolute()) for path in paths)
    if resolved.preset != "demo" or not ours or _is_made():
        return
    python = settings.environment.python
    if resolved.is_default("environment.python"):
        python = sys.executable
    words = f"hlrlhf: making the demo's models and data in {MODELS}, half a minute, once"
    print(words, file=sys.stderr, flush=True)
    command = [python, "-m", "hlrlhf.trainer.demo", str(MODELS)]
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DemoError(
            f"the demo's models could not be made ({error}); they need a Python with "
            "hlrlhf[train], see HL_ENVIRONMENT_PYTHON"
        ) from error


def _is_made() -> bool:
    """Whether the folder is complete, and of the recipe that is installed here; of any seed."""
    stamp = MODELS / "recipe.sha256"
    maker = resources.files("hlrlhf.trainer") / "demo.py"
    current = hashlib.sha256(maker.read_bytes()).hexdigest()
    return stamp.is_file() and stamp.read_text(encoding="utf-8").startswith(current)
