"""What can be set, in which layers, and where each value came from."""

from hlrlhf.settings.errors import Problem, SettingsError
from hlrlhf.settings.layers import Resolved, resolve
from hlrlhf.settings.origins import Origin
from hlrlhf.settings.schema import Settings

__all__ = ["Origin", "Problem", "Resolved", "Settings", "SettingsError", "resolve"]
