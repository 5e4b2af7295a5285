"""How much memory operations take, by the tensors that they make: the same on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Notes every piece of memory that an operation gives out, those of backward passes included.

    Args:
        known: tensors that are there already.

    Attributes:
        sizes: of each piece, in numbers.
    """

    def __init__(self, *known: Any):
        super().__init__()
        self.sizes: list[int] = []
        # Held, so that no other comes to lie at the same address.
        self._storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in known}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, known=True)
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._note(tensor, known=False)
        return result

    def _note(self, tensor: Any, known: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = tensor.detach()
            if not known:
                self.sizes.append(storage.nbytes() // tensor.element_size())
