"""habana_frameworks.torch.core"""

from habana_frameworks import record
from habana_frameworks.torch import hpu as hpu


def mark_step() -> None:
    """Run what has been collected."""
    record("mark_step")
