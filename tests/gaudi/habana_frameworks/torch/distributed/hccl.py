"""habana_frameworks.torch.distributed.hccl: importing it makes the backend known."""

from typing import Any

import torch.distributed as dist

from habana_frameworks import record


def _backend(store: Any, rank: int, size: int, timeout: Any) -> Any:
    record(f"hccl rank {rank} of {size}")
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


dist.Backend.register_backend("hccl", _backend, devices=["cpu", "hpu"])
