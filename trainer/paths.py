"""Whether what a run reads is there, on the host that is to read it."""

from __future__ import annotations

import socket
from operator import attrgetter
from pathlib import Path

import torch.distributed as dist

from hlrlhf.settings import Settings, paths
from hlrlhf.settings.names import env_name
from hlrlhf.trainer.errors import TrainerError


def check_paths(settings: Settings) -> None:
    """Stop before anything is read when an absolute path names nothing on this host.

    The libraries that read would take it for a name on the Hub, and speak of that.

    Raises:
        TrainerError: naming the path, the host and the setting.
    """
    places = paths.places()
    for name in paths.read(settings):
        if places[name].kind == "data" and dist.get_rank() > 0:
            continue  # rank 0 reads it for all
        if places[name].kind == "run":
            continue  # read only until the run has a checkpoint of its own
        value = attrgetter(name)(settings)
        for path in value if isinstance(value, tuple | list) else [value]:
            if path is None or not Path(path).is_absolute():
                continue
            try:
                Path(path).stat()
            except OSError as error:
                missing = isinstance(error, FileNotFoundError | NotADirectoryError)
                what = "does not exist" if missing else f"cannot be reached ({error.strerror})"
                raise TrainerError(
                    f"{path}: {what} on host {socket.gethostname()} ({env_name(name)}); it has to "
                    "lie where every node sees it, and where a container does (container.mounts)"
                ) from error
