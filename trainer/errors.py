"""What the trainer says when a run cannot go on."""


class TrainerError(Exception):
    """The run cannot go on; the text names what is wrong and what to do."""
