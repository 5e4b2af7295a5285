"""`hlrlhf render`"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hlrlhf.cli import options


def render(
    preset: options.Preset = None,
    config: options.Config = None,
    flags: options.Set = None,
    template: options.Template = None,
) -> None:
    """Print the batch script; nothing is written."""
    from hlrlhf.slurm import script

    resolved = options.resolved(preset, config, flags, template)
    settings = resolved.settings
    directory = Path(settings.base_out_path, settings.tag)
    sys.stdout.write(script.render(resolved, directory, os.environ))
