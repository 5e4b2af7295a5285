"""habana_frameworks.torch.utils.internal"""

from habana_frameworks.torch import LAZY


def is_lazy() -> bool:
    """The mode that the bridge was loaded in."""
    return LAZY
