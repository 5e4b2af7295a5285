"""What works on which architecture: ``python tests/examination.py`` writes docs/architectures.md.

Each architecture goes through what a run does with it, as a tiny random model. An assertion that
fails is a silent mistake of ours; a `TrainerError` is a refusal, which the table shows with its
reason.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import architectures
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from updates import made

from hlrlhf.trainer import flops
from hlrlhf.trainer.decoding.decoder import sampling
from hlrlhf.trainer.decoding.fixed import Fixed
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.decoding.shrinking import Shrinking
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import dropout, engine, forwards, loading, lora
from hlrlhf.trainer.ppo import rollout
from hlrlhf.trainer.ppo.update import update
from hlrlhf.trainer.saving import export

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
HEAD = """\
# Architectures

<!-- Made by tests/examination.py, `make docs`; a test fails when the two differ. -->

Each of these goes through a run as a tiny random model with two layers, with the transformers of
`constraints.txt`, on one rank, in fp32:

- **actor**: log-probs of a batch padded on the left, or on the right without a mask, are those that
  transformers gives for each row alone, within 1e-5 nats; those of sampled answers are those of the
  distribution that was sampled from; two updates move every weight;
- **critic, reward**: the same for the scores of every token, in both formats of a checkpoint;
- **LoRA**: with `lora.dim` and `only_optimize_lora`, two updates move all adapters and the critic's
  head and nothing else, and every matrix but embeddings and heads has an adapter;
- **activation checkpointing**: computes each layer twice, with the same gradient, and so with LoRA;
- **saved and loaded**: actor and critic give what they gave before, LoRA merged.

Names are transformers' own; what follows a dash is a variant. Sliding windows are shorter than the
texts. **refused** means that a run stops when it loads the model, with the reason in the last
column. Other architectures may work: a load checks what it can.

"""
COLUMNS = ("actor", "critic, reward", "LoRA", "activation checkpointing", "saved and loaded")
# In nats and in scores. Weights are drawn so that log-probs stay within 16, where fp32 has steps
# of 1e-6, and some ten roundings meet in each.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
# Of the gradient's norm, as in test_invariance.py.
OF_GRADIENT = 2e-5
ROWS = [[1, 5, 6, 7, 8, 9, 2], [1, 30, 2], [1, 11, 12, 2, 6]]


@dataclass
class Found:
    """An architecture's row: a word for each column, and reasons."""

    cells: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def row(self, architecture: str) -> str:
        """In Markdown."""
        cells = [self.cells[column] for column in COLUMNS]
        return f"| {' | '.join([architecture, *cells, '; '.join(self.notes)])} |\n"


@contextmanager
def one_thread() -> Iterator[None]:
    """What is this small is many times slower where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@one_thread()
def examine(architecture: str, folder: Path) -> Found:
    """Try everything on an architecture.

    Args:
        architecture: transformers' name.
        folder: an empty one.
    """
    found = Found()
    actor, critic = folder / "actor", folder / "critic"
    options = {"initializer_range": 0.2}
    tiny.save_policy(actor, architecture, **options)
    tiny.save_classifier(critic, architecture, **options)
    tiny.save_step2(folder / "step2", architecture, **options)
    runs: dict[str, Run] = {}

    def attempt(column: str, trial: Callable[[], None]) -> None:
        """A word for a column: the first refusal stays."""
        if reason := refusal(trial):
            reason = re.sub(r"^\S*: ", "", reason.replace(f"{folder}/", ""))
            found.notes.append(f"{column}: {reason}")
            found.cells[column] = "refused"
        else:
            found.cells.setdefault(column, "yes")

    def trained(kind: str, *flags: str) -> Run:
        if kind not in runs:
            runs[kind] = Run(folder, kind, *flags)
        return runs[kind]

    rates = ("lora.actor_lr=1e5", "lora.critic_lr=1e5")
    only = ("lora.dim=4", "only_optimize_lora=1", *rates)
    checkpointing = ("actor.cp_act=1", "critic.cp_act=1")

    def as_actor() -> None:
        check_policy(actor)
        trained("full").check_all_moved("actor")

    def as_critic() -> None:
        check_scorer(critic, folder / "step2")
        trained("full").check_all_moved("critic")

    def with_checkpointing() -> None:
        trained("checkpointed", *checkpointing).check_same_gradient(trained("full"))

    def with_both() -> None:
        again = trained("both", *only, *checkpointing)
        again.check_same_gradient(trained("lora", *only))

    attempt(COLUMNS[0], as_actor)
    attempt(COLUMNS[1], as_critic)
    attempt(COLUMNS[2], lambda: trained("lora", *only).check_adapters_alone_moved())
    attempt(COLUMNS[3], with_checkpointing)
    attempt(COLUMNS[4], lambda: trained("full").check_saved())
    if found.cells["LoRA"] == "yes":
        attempt(COLUMNS[3], with_both)
        attempt(COLUMNS[4], lambda: trained("lora").check_saved())
    if reason := refusal(lambda: check_dropout(actor, critic)):
        assert "HL_ACTOR_DROPOUT=0" in reason
        found.notes.append("its configuration takes no dropout above 0: needs `*.dropout` = 0")
    if reason := refusal(lambda: check_chunks(actor)):
        assert "HL_PPO_LOGPROB_CHUNK=0" in reason
        found.notes.append("changes its logits after the head: needs `ppo.logprob_chunk` = 0")
    return found


def refusal(trial: Callable[[], None]) -> str | None:
    """What a run says that does not go on; None when it does."""
    try:
        trial()
    except TrainerError as error:
        return str(error)
    return None


# 1. Forwards.


@torch.no_grad()
def check_policy(folder: Path) -> None:
    """Log-probs in padded batches, row by row, and of a rollout."""
    policy = loading.load_policy(str(folder), "fp32", 0.0).eval()
    assert flops.cost(policy).attention == 4 * 2 * 32  # two layers, heads as wide as the model
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, mask = tiny.padded(ROWS, width=10)
    padded_left = policy(ids, mask, 2, 1.0)
    ids, begins = tiny.begun_together(ROWS, 2)
    padded_right = policy(ids, None, 2, 1.0, begins=begins)

    def last(row: list[int]) -> Tensor:
        logprobs = plain(torch.tensor([row])).logits[0].log_softmax(-1)
        return torch.stack([logprobs[t - 1, row[t]] for t in (-2, -1)])

    for i, row in enumerate(ROWS):
        torch.testing.assert_close(padded_left[i], last(row), **TOLERANCE)
        torch.testing.assert_close(padded_right[i], last(row), **TOLERANCE)
        check_all_tell(lambda tokens: last(tokens)[-1], row)
    check_rollout(policy)
    # Its layers with a window take the cache's length for the text's, as with a static cache.
    windows = policy.lm.config.model_type == "gpt_neo"
    own = (Shrinking,) if windows else (Shrinking, Fixed)
    check_loops(policy, *own)


@torch.no_grad()
def check_scorer(folder: Path, step2: Path) -> None:
    """Scores of padded batches, at the last tokens of each row, of one model in two formats."""
    scorer = loading.load_scorer(str(folder), "fp32", 0.0).eval()
    assert flops.cost(scorer).attention == 4 * 2 * 32
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # Rows come one by one: without a padding token it reads each one's last.
    plain.config.pad_token_id = None
    ids, mask = tiny.padded(ROWS, width=10)
    padded_left = scorer(ids, mask, 2)
    as_step2 = loading.load_scorer(str(step2), "fp32", 0.0).eval()
    torch.testing.assert_close(as_step2(ids, mask, 2), padded_left, **TOLERANCE)
    ids, begins = tiny.begun_together(ROWS, 2)
    padded_right = scorer(ids, None, 2, begins=begins)

    def last(row: list[int]) -> Tensor:
        return plain(torch.tensor([row])).logits[0, 0]

    for i, row in enumerate(ROWS):
        expected = torch.stack([last(row[:-2]), last(row[:-1]), last(row)])
        torch.testing.assert_close(padded_left[i], expected, **TOLERANCE)
        torch.testing.assert_close(padded_right[i], expected, **TOLERANCE)
        check_all_tell(last, row)


def check_all_tell(last: Callable[[list[int]], Tensor], row: list[int]) -> None:
    """Another token in any place, or two in another order, would be seen."""
    expected = last(row)
    for place in range(len(row) - 1):
        other = [*row[:place], 40, *row[place + 1 :]]
        swapped = [*row[:place], *row[place : place + 2][::-1], *row[place + 2 :]]
        assert (last(other) - expected).abs() > 10 * TOLERANCE["atol"]
        assert (last(swapped) - expected).abs() > 10 * TOLERANCE["atol"]


def check_rollout(policy: forwards.Policy) -> None:
    """Log-probs of sampled answers are those of the probabilities that they were drawn from."""
    settings = tiny.settings("generation.max_new_tokens=6", "generation.temperature=0.7")
    cpu = tiny.cpu(settings)
    drawn_from = []
    draw = torch.multinomial

    def recorded(probabilities: Tensor, *arguments: Any, **options: Any) -> Tensor:
        drawn_from.append(probabilities)
        return draw(probabilities, *arguments, **options)

    torch.manual_seed(0)
    decoder = Plain(sampling(settings, None, [tiny.EOS], tiny.PAD, cpu), cpu)
    with mock.patch.object(torch, "multinomial", recorded):
        found = rollout.generate(decoder, tiny.Engine(policy), [row[:-1] for row in ROWS])
    policy.eval()
    logprobs = policy(found.sequences, found.attention_mask, found.answer_width, 0.7)
    answers = found.sequences[:, -found.answer_width :]
    expected = torch.stack(drawn_from, 1).log().gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    seen = found.answer_mask
    assert int(seen.sum()) > len(ROWS)
    torch.testing.assert_close(logprobs[seen], expected[seen], **TOLERANCE)


@torch.no_grad()
def check_loops(policy: forwards.Policy, *loops: type[Shrinking | Fixed]) -> None:
    """Our own loops write down the log-probs that scoring finds."""
    settings = tiny.settings("generation.max_new_tokens=12", "generation.temperature=0.7")
    cpu = tiny.cpu(settings)
    ends = list(range(2, 9))
    for loop in loops:
        torch.manual_seed(0)
        decoder = loop(sampling(settings, None, ends, tiny.PAD, cpu), cpu)
        decoded = decoder(tiny.Engine(policy), [row[:-1] for row in ROWS] * 3)
        found = rollout.from_sequences(
            decoded.sequences, decoded.prompt_mask, decoder.sampling.config
        )
        policy.eval()
        logprobs = policy(found.sequences, found.attention_mask, found.answer_width, 0.7)
        seen, width = found.answer_mask, found.answer_width
        assert decoded.logprobs is not None
        torch.testing.assert_close(logprobs[seen], decoded.logprobs[:, :width][seen], **TOLERANCE)


@torch.no_grad()
def check_chunks(folder: Path) -> None:
    """Log-probs in chunks are those of whole logits."""
    ids, mask = tiny.padded(ROWS, width=10)
    whole, chunked = (
        loading.load_policy(str(folder), "fp32", 0.0, chunk).eval()(ids, mask, 2, 1.0)
        for chunk in (0, 1)
    )
    torch.testing.assert_close(chunked, whole, **TOLERANCE)


def check_dropout(actor: Path, critic: Path) -> None:
    """Every rate that a module holds is the setting's, and no noise."""
    policy = loading.load_policy(str(actor), "fp32", 0.25)
    scorer = loading.load_scorer(str(critic), "fp32", 0.25)
    for model in (policy, scorer):
        rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        for module in model.modules():
            held = {name: value for name, value in vars(module).items() if isinstance(value, float)}
            rates |= {value for name, value in held.items() if dropout.DROPOUT.search(name)}
            assert not any(value for name, value in held.items() if dropout.NOISE.search(name))
        assert rates == {0.25}


# 2. Updates.


class Run:
    """Actor and critic through two updates.

    With `tiny.DESCENT` the first one moves weights by a constant times the gradient.
    """

    def __init__(self, folder: Path, kind: str, *flags: str):
        self.folder = folder / kind
        self.settings = tiny.settings(
            "mbs=4",
            *tiny.DESCENT,
            *flags,
        )
        cpu = tiny.cpu(self.settings)
        policy = loading.load_policy(str(folder / "actor"), "fp32", 0.0)
        scorer = loading.load_scorer(str(folder / "critic"), "fp32", 0.0)
        torch.manual_seed(3)  # adapters
        self.engines: dict[str, Any] = {}
        for role, model in (("actor", policy), ("critic", scorer)):
            own = getattr(self.settings, role)
            if own.cp_act:
                model.inner.gradient_checkpointing_enable({"use_reentrant": False})
            if self.settings.lora.dim:
                lora.add_adapters(model, self.settings)
            self.engines[role] = engine.trained(model, own, self.settings, cpu, updates=10)
        experience = made(self.settings)
        start = self._weights()
        with ExitStack() as stack:
            counts = [stack.enter_context(counted(e.module)) for e in self.engines.values()]
            _, whole = update(experience, tiny.models(**self.engines), None, self.settings)
            self.forwards = [sum(count) for count in counts]
        assert whole
        first = self._weights()
        self.gradient = {
            role: torch.cat([(first[n] - start[n]).flatten() for n in start if n.startswith(role)])
            for role in self.engines
        }
        _, whole = update(experience, tiny.models(**self.engines), None, self.settings)
        assert whole
        self.moved = {
            name for name, value in self._weights().items() if not value.equal(start[name])
        }
        self.still = start.keys() - self.moved

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{role}.{name}": value.detach().clone()
            for role, trained in self.engines.items()
            for name, value in trained.module.named_parameters()
        }

    def check_all_moved(self, role: str) -> None:
        """Every weight of a model, but for biases of keys, which shift all scores of a query."""
        still = {name for name in self.still if name.startswith(role)}
        assert not {name for name in still if not name.endswith("k_proj.bias")}

    def check_adapters_alone_moved(self) -> None:
        """All of them and the critic's head; and no other matrix lies bare."""
        heads = {name for name in self.moved if name.endswith(".score.weight")}
        assert len(heads) == 1
        assert self.moved - heads == {n for n in self.moved | self.still if lora.is_adapter(n)}
        for trained in self.engines.values():
            inner = trained.module.inner
            apart = [m.weight for m in inner.modules() if isinstance(m, nn.Embedding)]
            apart += [inner.score.weight] if hasattr(inner, "score") else []
            if head := inner.get_output_embeddings() if hasattr(inner, "lm_head") else None:
                apart.append(head.weight)
            bare = {
                name
                for name, weight in inner.named_parameters()
                if weight.ndim > 1
                and ".base_layer." not in name
                and not lora.is_adapter(name)
                and not any(weight is other for other in apart)
            }
            assert not bare

    def check_same_gradient(self, expected: Run) -> None:
        """As without activation checkpointing, which computes twice what it does not keep."""
        assert self.forwards == [2 * count for count in expected.forwards]
        for role, gradient in expected.gradient.items():
            difference = (self.gradient[role] - gradient).norm() / gradient.norm()
            assert difference < OF_GRADIENT, (role, difference)

    @torch.no_grad()
    def check_saved(self) -> None:
        """Actor and critic, loaded again."""
        attempt = tiny.attempt(self.folder)
        export.save_models(self.folder, tiny.models(**self.engines), tiny.tokenizer(), attempt)
        ids, mask = tiny.padded(ROWS, width=10)
        actor, critic = (trained.module.eval() for trained in self.engines.values())
        policy = loading.load_policy(str(self.folder / "actor"), "fp32", 0.0).eval()
        scorer = loading.load_scorer(str(self.folder / "critic"), "fp32", 0.0).eval()
        torch.testing.assert_close(policy(ids, mask, 2, 1.0), actor(ids, mask, 2, 1.0), **TOLERANCE)
        torch.testing.assert_close(scorer(ids, mask, 2), critic(ids, mask, 2), **TOLERANCE)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Count the forwards of what is inside the first of a model's layers."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    inside = next(m for m in layers[0].modules() if not list(m.children()))
    count: list[int] = []
    hook = inside.register_forward_hook(lambda *_: count.append(1))
    yield count
    hook.remove()


# 3. The page.


TITLES = [("architecture", *COLUMNS, "note"), ("---",) * (len(COLUMNS) + 2)]
TOP = HEAD + "".join(f"| {' | '.join(titles)} |\n" for titles in TITLES)


def page() -> str:
    """The page as Markdown."""
    rows = []
    for architecture in architectures.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(examine(architecture, Path(folder)).row(architecture))
    return TOP + "".join(rows)


if __name__ == "__main__":
    with tiny.only_rank():
        DOCUMENT.write_text(page(), encoding="utf-8")
