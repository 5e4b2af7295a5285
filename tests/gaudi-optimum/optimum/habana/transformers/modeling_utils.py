"""optimum.habana.transformers.modeling_utils"""

from typing import Any

import transformers
from habana_frameworks import record


def adapt_transformers_to_gaudi() -> None:
    """Put another ``generate`` into all models, with arguments of its own."""
    record("adapt_transformers_to_gaudi")
    plain = transformers.generation.GenerationMixin.generate

    def generate(
        self: Any,
        *args: Any,
        lazy_mode: bool = False,
        hpu_graphs: bool = False,
        ignore_eos: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if hpu_graphs and not lazy_mode:
            raise ValueError("HPU graphs require `lazy_mode` to be set to True.")
        stops = not (lazy_mode if ignore_eos is None else ignore_eos)
        cache = kwargs["generation_config"].cache_implementation
        record(f"generate {lazy_mode=} {hpu_graphs=} {stops=} {cache=}")
        return plain(self, *args, **kwargs)

    transformers.generation.GenerationMixin.generate = generate
