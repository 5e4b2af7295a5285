"""What the trainer says when a run cannot go on."""

from hlrlhf.errors import HlrlhfError


class TrainerError(HlrlhfError):
    """The run cannot go on; the text names what is wrong and what to do."""
