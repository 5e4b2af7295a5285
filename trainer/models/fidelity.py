"""Tokenizers that encode as their files say, whatever a release of transformers makes of them.

transformers 5 takes the vocabulary out of a tokenizer's files and builds the steps around it
anew, from what it knows of the class. For Llama's that loses a space of those that a text begins
with, does not see the dummy prefix of texts after a special token, and puts no BOS in front where
tokenizer_config.json says nothing about it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

STEPS = ("normalizer", "pre_tokenizer", "decoder")
# What sentencepiece writes for a space.
SPACE = "▁"


def as_its_files_say(tokenizer: Any, serialized: Path | None, said: dict[str, Any]) -> Any:
    """The tokenizer itself, or one in its place that encodes and decodes as its files say.

    Args:
        tokenizer: as transformers loads it.
        serialized: its tokenizer.json, if there is one.
        said: what is in its tokenizer_config.json, if there is one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    if serialized is not None:
        right = Tokenizer.from_file(str(serialized))
        # Of these, tokenizer_config.json may change a part (add_prefix_space).
        if isinstance(right.pre_tokenizer, pre_tokenizers.ByteLevel):
            return tokenizer
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        model = getattr(tokenizer, "vocab_file", None)
        if not model or not Path(model).is_file():
            return tokenizer
        if "add_bos_token" not in said:
            tokenizer.add_bos_token = True  # as transformers 4 has it
        right = _of_sentencepiece(Path(model), said.get("legacy", True))
    else:
        return tokenizer
    if all(_state(getattr(right, step)) == _state(getattr(backend, step)) for step in STEPS):
        return tokenizer
    for step in STEPS:
        setattr(backend, step, getattr(right, step))
    # A class that takes tokenizer.json as it is, also where the saved actor is loaded again.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=tokenizer.name_or_path,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )


def _state(step: Any) -> bytes | None:
    """What tells steps apart, but for how they count offsets, which nothing here asks for."""
    if step is None:
        return None
    state: bytes = step.__getstate__()
    return state.replace(b'"trim_offsets":true', b'"trim_offsets":false')


def _of_sentencepiece(model: Path, legacy: bool) -> Any:
    """The steps around the vocabulary of a sentencepiece model, in a tokenizer without one.

    Args:
        model: the file.
        legacy: whether a text after a special token gets the dummy prefix too; transformers' slow
            tokenizer, which has the setting from tokenizer_config.json, does so by default.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    says = proto.normalizer_spec
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    if says.remove_extra_whitespaces:
        spaces = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " "), *spaces]
    if says.precompiled_charsmap:
        spaces = [normalizers.Precompiled(says.precompiled_charsmap), *spaces]
    made = Tokenizer(BPE())
    made.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if says.add_dummy_prefix:
        # One that writes the prefix as a space, which no text has any more by then, and one that
        # turns it into what sentencepiece has for it: where it begins with SPACE already,
        # Metaspace would let a text go without.
        scheme = "always" if legacy else "first"
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", scheme, split=False),
                pre_tokenizers.Metaspace(SPACE, "never", split=False),
            ]
        )
        steps.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(steps)
    return made
