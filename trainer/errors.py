"""What the trainer says when a run cannot go on."""

from hlrlhf.errors import HlrlhfError


class TrainerError(HlrlhfError):
    """The run cannot go on; the text names what is wrong and what to do."""


class DeviceError(TrainerError):
    """A device is not there or does not answer; on another node it may."""


# CUDA's error codes that no program causes: devices unavailable, no device, and memory or NVLink
# whose errors cannot be corrected.
_BROKEN = (46, 100, 214, 220)


def is_of_node(error: BaseException) -> bool:
    """Whether a node is at fault rather than the run."""
    # torch's AcceleratorError has the code.
    return isinstance(error, DeviceError) or getattr(error, "error_code", None) in _BROKEN


class HungError(TrainerError):
    """The run no longer gets on; another start may go better."""
