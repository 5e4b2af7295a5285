"""The demo's models and data, made here in seconds: ``python -m hlrlhf.trainer.demo FOLDER``.

What comes out has the formats of real runs, so this is also a worked example of them::

    FOLDER/actor/          a causal language model: safetensors, configs, tokenizer
    FOLDER/reward/         a reward model as DeepSpeed-Chat's step 2 saves it
    FOLDER/reward-hf/      the same as a sequence classifier with one label
    FOLDER/prompts/        train.jsonl and eval.jsonl: prompt, chosen, rejected

The three steps of RLHF in miniature: somebody asks for help; the actor is fine-tuned on answers of
which each sentence is kind or rude by the toss of a coin; the reward model learns from pairs that
the kinder answer is the better one; PPO, which is the run itself, then makes the actor kind.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

Rows = list[dict[str, str]]

SEED = 1
STAMP = "recipe.sha256"
TRAIN_ROWS, EVAL_ROWS = 2560, 256
BATCH = 16  # pairs

ASKS = (
    "Can you help me {task}?",
    "How do I {task}?",
    "Please tell me how to {task}.",
    "What is the best way to {task}?",
    "I would like to {task}. Any advice?",
    "My plan is to {task}. Where do I start?",
)
VERBS = ("choose", "clean", "find", "move", "paint", "repair", "sell", "store")
THINGS = ("bicycle", "boat", "camera", "chair", "clock", "door", "guitar", "lamp", "piano")
ENDINGS = (
    "",
    " today",
    " this week",
    " before winter",
    " for my sister",
    " on a small budget",
    " all by myself",
    " with my children",
)
# An answer is an opening, a body and a closing; of each there are rude and kind ones.
PARTS = (
    (
        ("No way.", "Forget it.", "Not again.", "Bad question."),
        ("Of course!", "Certainly!", "With pleasure!", "Good question!"),
    ),
    (
        ("I am tired of your {thing}.", "Your {thing} will be ugly."),
        ("I am glad to help with the {thing}.", "Your {thing} will be lovely."),
    ),
    (
        ("Do not ask me.", "You will fail.", "Leave me alone."),
        ("Ask me any time.", "You will do well.", "Enjoy it."),
    ),
)


class RewardModel(nn.Module):
    """A transformer without head and a scalar on top, under DeepSpeed-Chat's names."""

    def __init__(self, base: LlamaModel):
        super().__init__()
        self.rwtransformer = base
        self.v_head = nn.Linear(base.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.v_head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [b] of right-padded sequences [b, seq_len], read at each one's last token."""
        hidden = self.rwtransformer(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        score: Tensor = self.v_head(hidden[torch.arange(len(hidden)), last]).squeeze(-1)
        return score


def write_rows(count: int, seed: int) -> Rows:
    """Preference pairs, each with a prompt of its own; the chosen answer has more kind parts."""
    rng = random.Random(seed)  # noqa: S311
    tasks = list(itertools.product(ASKS, VERBS, THINGS, ENDINGS))
    manners = itertools.product((False, True), repeat=len(PARTS))  # kind, part by part
    pairs = [pair for pair in itertools.combinations(manners, 2) if sum(pair[0]) != sum(pair[1])]
    rows = []
    for ask, verb, thing, ending in rng.sample(tasks, count):
        request = ask.format(task=f"{verb} a {thing}{ending}")
        better, worse = sorted(rng.choice(pairs), key=sum, reverse=True)
        chosen, rejected = (
            "".join(" " + rng.choice(part[kind]) for part, kind in zip(PARTS, manner, strict=True))
            for manner in (better, worse)
        )
        rows.append(
            {
                "prompt": f"Human: {request}\n\nAssistant:",
                "chosen": chosen.format(thing=thing),
                "rejected": rejected.format(thing=thing),
            }
        )
    return rows


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts ``<s>`` in front; pad, bos and eos are three tokens."""
    pad, bos, eos = special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )


def encode(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> tuple[Tensor, Tensor]:
    """All rows with the chosen, then all with the rejected answer, each closed by EOS.

    Returns token ids and mask, right-padded, [2b, seq_len].
    """
    texts = [
        row["prompt"] + row[answer] + tokenizer.eos_token
        for answer in ("chosen", "rejected")
        for row in rows
    ]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def fit(
    model: nn.Module, rows: Rows, loss_of: Callable[[Rows], Tensor], *, rate: float, epochs: int
) -> None:
    """AdamW on batches of the rows; the rate rises quickly to `rate` and falls slowly to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=rate,
        total_steps=epochs * len(rows) // BATCH,
        pct_start=0.1,
        cycle_momentum=False,
    )
    for _ in range(epochs):
        for indices in torch.split(torch.randperm(len(rows)), BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(loss_of([rows[index] for index in indices]))
            optimizer.step()
            schedule.step()


def train_actor(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> LlamaForCausalLM:
    """Step 1, supervised fine-tuning: on good and bad answers alike, for PPO to choose from."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    width = 64
    actor = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            # As 0.02 is for the widths of Llama. Words that are alike here would be so for good
            # where embeddings and head are frozen, as with adapters alone.
            initializer_range=width**-0.5,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            **special,
        )
    )
    actor.generation_config = GenerationConfig(do_sample=True, **special)

    def loss(batch: Rows) -> Tensor:
        ids, mask = encode(tokenizer, batch)
        prompts = tokenizer([row["prompt"] for row in batch])["input_ids"]
        starts = torch.tensor([len(prompt) for prompt in prompts * 2])
        outside_answer = (mask == 0) | (torch.arange(ids.shape[1]) < starts[:, None])
        labels = ids.masked_fill(outside_answer, -100)
        result: Tensor = actor(ids, attention_mask=mask, labels=labels).loss
        return result

    fit(actor, rows, loss, rate=1e-2, epochs=2)
    return actor


def train_reward(
    tokenizer: PreTrainedTokenizerFast, rows: Rows, actor: LlamaForCausalLM
) -> RewardModel:
    """Step 2, the reward model: from the actor's weights, by the pairwise logistic loss."""
    reward = RewardModel(copy.deepcopy(actor.model))

    def loss(batch: Rows) -> Tensor:
        better, worse = reward(*encode(tokenizer, batch)).chunk(2)
        ranking = -nn.functional.logsigmoid(better - worse).mean()
        # A constant added to all scores is free in the ranking, and so is their growth once the
        # order is right: this pulls them to zero, far inside the clip that PPO applies.
        size = (better.square() + worse.square()).mean()
        result: Tensor = ranking + 0.005 * size
        return result

    fit(reward, rows, loss, rate=2e-3, epochs=1)
    return reward


def as_classifier(reward: RewardModel) -> LlamaForSequenceClassification:
    """The same reward model as Hugging Face's sequence classifier with one label."""
    config = copy.deepcopy(reward.rwtransformer.config)
    config.num_labels = 1
    classifier = LlamaForSequenceClassification(config)
    classifier.model.load_state_dict(reward.rwtransformer.state_dict())
    classifier.score.load_state_dict(reward.v_head.state_dict())
    return classifier


def write(folder: Path, seed: int) -> None:
    """Make everything in `folder`, which exists."""
    torch.manual_seed(seed)
    rows = write_rows(TRAIN_ROWS + EVAL_ROWS, seed)
    train, held_out = rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]
    (folder / "prompts").mkdir()
    for name, part in (("train", train), ("eval", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "prompts" / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    tokenizer = train_tokenizer([text for row in train for text in row.values()])
    actor = train_actor(tokenizer, train)
    reward = train_reward(tokenizer, train, actor)

    actor.save_pretrained(folder / "actor")
    # DeepSpeed-Chat saves the weights under their names in the module, and the base model's config.
    reward.rwtransformer.config.save_pretrained(folder / "reward")
    torch.save(reward.state_dict(), folder / "reward" / "pytorch_model.bin")
    as_classifier(reward).save_pretrained(folder / "reward-hf")
    for name in ("actor", "reward", "reward-hf"):
        tokenizer.save_pretrained(folder / name)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from more; and the outcome is the same on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def is_made(folder: Path, seed: int = SEED) -> bool:
    """Whether `folder` is complete and was made by this very recipe."""
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe(seed)


def recipe(seed: int) -> str:
    """What the outcome depends on: this file and the seed."""
    return f"{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()} {seed}"


def make(folder: Path, seed: int = SEED) -> None:
    """Make the demo's models and data in `folder`, unless this very recipe already did.

    The folder appears whole or not at all, and one of another recipe is replaced.

    Raises:
        FileExistsError: the folder holds something else.
    """
    if is_made(folder, seed):
        return
    if folder.exists() and not (folder / STAMP).is_file():
        raise FileExistsError(f"{folder} exists and is not the demo's: remove it or choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        fresh = Path(work, "fresh")
        fresh.mkdir()
        with one_thread(), torch.random.fork_rng(devices=[]):
            write(fresh, seed)
        (fresh / STAMP).write_text(recipe(seed), encoding="utf-8")
        if folder.exists():
            folder.rename(Path(work, "old"))
        try:
            fresh.rename(folder)
        except OSError:
            # Somebody else made the same at the same time, and was first.
            if not is_made(folder, seed):
                raise


def main() -> None:
    """The command line: one folder, and perhaps another seed than the demo's."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s")
    given = parser.parse_args()
    disable_progress_bar()
    try:
        make(given.folder, given.seed)
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
