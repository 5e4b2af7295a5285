"""Tokenizers: whether they fit the models, where the actor's is, and what Llama's encodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import (
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import loading, tokenizers

# 1. Vocabulary and special tokens.


def test_every_model_needs_an_embedding_for_every_token(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    fits = loading.load_policy(
        str(tiny.save_policy(tmp_path / "actor", "llama", vocabulary=len(tokenizer))), "fp32", 0.0
    )
    small = loading.load_scorer(
        str(tiny.save_classifier(tmp_path / "hf", "bloom", vocabulary=len(tokenizer) - 1)),
        "fp32",
        0.0,
    )

    tokenizers.check_vocabulary(tokenizer, "actor", fits)
    with pytest.raises(TrainerError) as caught:
        tokenizers.check_vocabulary(tokenizer, "critic", small)
    assert str(len(tokenizer) - 1) in str(caught.value)
    assert str(caught.value).startswith("the critic has embeddings for")


def test_a_tokenizer_beside_a_model_is_found_when_it_is_whole(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    # From such a configuration alone, transformers makes up a tokenizer of one token.
    tiny.config("gpt2").save_pretrained(tmp_path)
    assert tokenizers.held_tokenizer(str(tmp_path)) is None
    # What DeepSpeed-Chat leaves beside a reward model.
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "vocab.json", "merges.txt"}
    assert tokenizers.held_tokenizer(str(tmp_path)) is None

    tokenizer.save_pretrained(tmp_path)
    assert tokenizers.held_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()

    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TrainerError, match="no tokenizer can be loaded"):
        tokenizers.held_tokenizer(str(tmp_path))
    assert tokenizers.held_tokenizer("/nowhere/at/all") is None


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "expected"),
    [(2, "</s>", [2]), ([5, 2], "</s>", [5, 2]), (None, "</s>", [2]), (7, None, [7])],
)
def test_end_tokens(
    tmp_path: Path, configured: Any, of_tokenizer: str | None, expected: list[int]
) -> None:
    policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.0)
    policy.generation_config.eos_token_id = configured
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = of_tokenizer

    assert tokenizers.end_tokens(policy, tokenizer) == expected


def test_no_end_token_at_all_is_refused(tmp_path: Path) -> None:
    policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.0)
    policy.generation_config.eos_token_id = None
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(TrainerError, match="no end-of-sequence token"):
        tokenizers.end_tokens(policy, tokenizer)


def test_the_checkpoints_generation_configuration_is_kept(tmp_path: Path) -> None:
    folder = tiny.save_policy(tmp_path, "llama")
    GenerationConfig(max_length=77, eos_token_id=[2, 5]).save_pretrained(folder)

    policy = loading.load_policy(str(folder), "fp32", 0.0)

    assert policy.generation_config.max_length == 77
    assert tokenizers.end_tokens(policy, tiny.tokenizer()) == [2, 5]


# 2. Where the actor's tokenizer is.

TEXTS = [
    "Human: where is the blue boat?\n\nAssistant: In the harbour.",
    "user assistant system  two spaces    four",
    "def f(x):\n    return x\n        y  z",
]
PROBES = [
    "Human: where is the blue boat?\n\nAssistant:",
    "two  spaces,   three",
    "  two in front",
    " one in front",
    "two behind  ",
    " ",
    "\n\nlines\n  between",
    "tab\tand 日本 naïve",
    "12 345",
    "the end</s>and more",
    "the end</s> and more",
    "the end</s>  and more",
    "<s>begun",
    "<s> begun",
]


def byte_level(special: list[str]) -> Tokenizer:
    """As GPT-2's: bytes, and no special token put in front."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def sentencepiece_model(path: Path, **options: Any) -> SentencePieceProcessor:
    """As Llama 2's: BPE with bytes for what it does not know, and every space kept."""
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter([text.replace("\n", " ") for text in TEXTS] * 30),
            model_writer=file,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
            **(kept | options),
        )
    return SentencePieceProcessor(model_file=str(path))


def said(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def opt(base: Path) -> None:
    byte_level(["<s>", "<pad>", "</s>"]).model.save(str(base))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    said(base, tokenizer_class="GPT2Tokenizer", add_bos_token=True, **special)


def gpt2(base: Path) -> None:
    byte_level(["<|endoftext|>"]).model.save(str(base))
    said(base, model_max_length=1024)


def qwen2(base: Path) -> None:
    byte_level([]).model.save(str(base))
    added = {
        str(301 + i): {"content": token, "special": True}
        for i, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    }
    said(
        base,
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        added_tokens_decoder=added,
    )


def llama(base: Path) -> None:
    sentencepiece_model(base / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    said(base, tokenizer_class="LlamaTokenizer", add_bos_token=True, **special)


def bloom(base: Path) -> None:
    byte_level(["<unk>", "<s>", "</s>", "<pad>"]).save(str(base / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    said(base, tokenizer_class="BloomTokenizerFast", **special)


# How each is made, and what its `save_vocabulary` writes. BLOOM's writes the parts of its BPE.
FAMILIES = {
    "opt": (opt, OPTConfig, ["vocab.json", "merges.txt"]),
    "gpt2": (gpt2, GPT2Config, ["vocab.json", "merges.txt"]),
    "qwen2": (qwen2, Qwen2Config, ["vocab.json", "merges.txt"]),
    "llama": (llama, LlamaConfig, ["tokenizer.model"]),
    "bloom": (bloom, BloomConfig, ["vocab.json", "merges.txt"]),
}
families = pytest.mark.parametrize("family", FAMILIES)


def based(tmp_path: Path, family: str) -> Path:
    """A model's folder with its whole tokenizer."""
    make, config, _ = FAMILIES[family]
    base = tmp_path / "base"
    base.mkdir()
    make(base)
    config().to_json_file(base / "config.json")
    return base


def step1(tmp_path: Path, family: str, base: Path, name: str | None = None) -> Path:
    """The folder that DeepSpeed-Chat's `save_hf_format` writes, its weights left out."""
    _, config, parts = FAMILIES[family]
    folder = tmp_path / "step1"
    folder.mkdir()
    written = config().to_dict() | {"_name_or_path": name or str(base)}
    (folder / "config.json").write_text(json.dumps(written))
    if family == "bloom":
        Tokenizer.from_file(str(base / "tokenizer.json")).model.save(str(folder))
    else:
        for part in parts:
            shutil.copy(base / part, folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", *parts}
    return folder


def same(one: Any, other: Any) -> bool:
    """Whether two tokenizers encode every probe alike, and have the same special tokens."""
    assert len({tuple(ids) for ids in one(PROBES)["input_ids"]}) > len(PROBES) - 3
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    alike = one(PROBES)["input_ids"] == other(PROBES)["input_ids"]
    return alike and all(getattr(one, name) == getattr(other, name) for name in special)


def of_actor(folder: Path, *flags: str) -> Any:
    return tokenizers.actor_tokenizer(tiny.settings(f"actor.model_path={folder}", *flags))


@families
def test_an_actor_of_deepspeed_chat_has_the_tokenizer_that_its_config_names(
    tmp_path: Path, family: str
) -> None:
    base = based(tmp_path, family)
    whole = tokenizers.load_tokenizer(str(base))

    found = of_actor(step1(tmp_path, family, base))

    assert same(found, whole)
    assert found.eos_token == {"gpt2": "<|endoftext|>", "qwen2": "<|im_end|>"}.get(family, "</s>")
    begins = {"opt": "</s>", "llama": "<s>"}.get(family)
    assert found("x")["input_ids"][0] == (found.convert_tokens_to_ids(begins or "x"))


def test_what_the_config_names_may_be_on_the_hub(tmp_path: Path) -> None:
    """As `facebook/opt-1.3b`: here it is in the cache, and there is no network."""
    base = based(tmp_path, "opt")
    folder = step1(tmp_path, "opt", base, "me/base")
    cached = tmp_path / "cache" / "models--me--base"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, cached / "snapshots" / ("0" * 40))
    program = (
        "import json, sys\n"
        "from hlrlhf.trainer.models import tokenizers\n"
        "found = tokenizers.model_tokenizer(sys.argv[1], 'no remedy')\n"
        "print(json.dumps(found(json.loads(sys.argv[2]))['input_ids']))\n"
    )

    # Where the cache is, the library asks when it is imported.
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), json.dumps(PROBES)],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    whole = tokenizers.load_tokenizer(str(base))
    assert json.loads(done.stdout.splitlines()[-1]) == whole(PROBES)["input_ids"]


@families
def test_the_tokenizer_of_the_saved_actor_is_the_same(tmp_path: Path, family: str) -> None:
    found = of_actor(based(tmp_path, family))
    saved = tmp_path / "saved"
    FAMILIES[family][1]().to_json_file(saved.with_name("config.json"))

    found.save_pretrained(saved)
    shutil.copy(saved.with_name("config.json"), saved)

    assert same(tokenizers.load_tokenizer(str(saved)), found)
    again = AutoTokenizer.from_pretrained(saved)
    assert same(again, found), "for anything else that loads it"
    assert set(again("x")) <= {"input_ids", "attention_mask"}, "what a causal model takes"


@families
def test_a_whole_tokenizer_beside_the_actor_comes_before_the_named_one(
    tmp_path: Path, family: str
) -> None:
    base = based(tmp_path, family)
    folder = step1(tmp_path, family, base, "/nowhere/at/all")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)

    assert same(of_actor(folder), tokenizers.load_tokenizer(str(base)))


@pytest.mark.knob("actor.tokenizer_path")
def test_the_setting_comes_before_all(tmp_path: Path) -> None:
    own = based(tmp_path, "gpt2")
    other = tmp_path / "other"
    tiny.tokenizer().save_pretrained(other)

    assert same(of_actor(own, f"actor.tokenizer_path={other}"), tiny.tokenizer())
    assert not same(of_actor(own), tiny.tokenizer())


@families
def test_no_tokenizer_is_made_up_from_half_its_files(tmp_path: Path, family: str) -> None:
    folder = step1(tmp_path, family, based(tmp_path, family), "/nowhere/at/all")

    with pytest.raises(TrainerError) as caught:
        of_actor(folder)

    told = str(caught.value)
    assert told.startswith(f"{folder}: holds no whole tokenizer")
    for part in ("config.json", *FAMILIES[family][2], "/nowhere/at/all", "HL_ACTOR_TOKENIZER_PATH"):
        assert part in told


@pytest.mark.parametrize(
    "config", ["", "[]", '{"_name_or_path": ""}', "{}", '{"_name_or_path": 1}']
)
def test_where_the_config_names_none_the_error_says_so(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)

    with pytest.raises(TrainerError, match=r"names no other model .* set HL_ACTOR_TOKENIZER_PATH"):
        of_actor(tmp_path)


def test_a_setting_that_names_no_whole_tokenizer_is_an_error(tmp_path: Path) -> None:
    base = based(tmp_path, "opt")
    folder = step1(tmp_path, "opt", base)

    with pytest.raises(TrainerError, match=f"^{folder}: holds no whole tokenizer"):
        of_actor(base, f"actor.tokenizer_path={folder}")


def test_a_tokenizer_without_its_vocabulary_is_an_error(tmp_path: Path) -> None:
    base = based(tmp_path, "gpt2")
    for part in ("vocab.json", "merges.txt"):
        (base / part).unlink()

    with pytest.raises(TrainerError, match=f"^{base}: .*vocabulary"):
        of_actor(base)


@pytest.mark.slow
def test_a_run_from_a_folder_of_deepspeed_chat_is_the_run_with_the_whole_one(
    demo_models: Path, tmp_path: Path
) -> None:
    """Prompts, stop strings, evaluation and the saved actor have the tokenizer that is named."""
    parts = shutil.copytree(demo_models / "actor", tmp_path / "actor")
    whole = tokenizers.load_tokenizer(str(parts))
    for file in parts.glob("*token*"):
        file.unlink()
    whole.backend_tokenizer.model.save(str(parts))
    config = json.loads((parts / "config.json").read_text())
    config["_name_or_path"] = str(demo_models / "actor")
    (parts / "config.json").write_text(json.dumps(config))
    runs = []
    for name, folder in (("whole", demo_models / "actor"), ("parts", parts)):
        ranks.prepare(
            tmp_path / name,
            demo_models,
            actor__model_path=folder,
            generation__stop=[" the"],
            evaluation__interval=2,
            run_steps=2,
        )
        runs.append(ranks.train(tmp_path / name))
        assert runs[-1].codes == [0], runs[-1].output

    for name in ("samples.jsonl", "evaluations.jsonl"):
        one, other = (ranks.read_lines(run.directory / name) for run in runs)
        assert one == other
    saved = runs[1].directory / "checkpoints" / "final" / "actor"
    assert same(tokenizers.load_tokenizer(str(saved)), whole)


# 3. Llama's tokenizer, which transformers rebuilds from parts.


def pieces(model: SentencePieceProcessor, text: str) -> list[int]:
    """What the reference's slow tokenizer gives: each stretch between special tokens by itself."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    parts = [part for part in re.split("(<unk>|<s>|</s>)", text) if part]
    return [
        id for part in parts for id in ([special[part]] if part in special else model.encode(part))
    ]


CLEANED_UP = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}


@pytest.mark.parametrize(
    ("options", "serialized"),
    [({}, False), ({}, True), (CLEANED_UP, False)],
    ids=["spaces stay", "as beside Llama 2", "spaces are cleaned up"],
)
@pytest.mark.parametrize("bos", [{}, {"add_bos_token": True}])
def test_llamas_ids_are_those_of_sentencepiece(
    tmp_path: Path, options: dict[str, Any], serialized: bool, bos: dict[str, bool]
) -> None:
    model = sentencepiece_model(tmp_path / "tokenizer.model", **options)
    LlamaConfig().to_json_file(tmp_path / "config.json")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    said(tmp_path, tokenizer_class="LlamaTokenizer", **special, **bos)
    if serialized:
        serialize_as_llama2(tmp_path)

    found = tokenizers.load_tokenizer(str(tmp_path))

    for text in PROBES:
        assert found(text)["input_ids"] == [1, *pieces(model, text)], text
    if not options:
        for text in PROBES[:9]:
            assert found.decode(found(text)["input_ids"][1:]) == text


def serialize_as_llama2(folder: Path) -> None:
    """The tokenizer.json that is beside Llama 2: the dummy prefix is a normalizer's."""
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))


def test_without_legacy_only_a_whole_text_gets_the_dummy_prefix(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "tokenizer.model")
    LlamaConfig().to_json_file(tmp_path / "config.json")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    said(tmp_path, tokenizer_class="LlamaTokenizer", legacy=False, **special)

    found = tokenizers.load_tokenizer(str(tmp_path))

    for text in PROBES[:9]:
        assert found(text)["input_ids"] == [1, *model.encode(text)]
    for after in ("and more", " and more", "  and more"):
        ids = found(f"the end</s>{after}")["input_ids"]
        assert ids[: ids.index(2)] == [1, *model.encode("the end")]
        told = [found.convert_ids_to_tokens(id) for id in ids[ids.index(2) + 1 :]]
        assert "".join(told) == after.replace(" ", "▁")
