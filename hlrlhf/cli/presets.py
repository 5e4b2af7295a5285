"""`hlrlhf presets`"""

from __future__ import annotations

import os

from hlrlhf.cli.table import columns
from hlrlhf.settings.errors import printable
from hlrlhf.settings.presets import available, summary


def presets() -> None:
    """List the presets. Ours, and those in the folders of HLRLHF_PRESET_PATH."""
    rows = [
        (printable(name), printable(summary(path))) for name, path in available(os.environ).items()
    ]
    print(columns(rows))
