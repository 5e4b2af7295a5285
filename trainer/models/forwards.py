"""The four models, wrapped so that one forward gives what PPO needs."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from hlrlhf.trainer import formulas
from hlrlhf.trainer.models import chunks


class Placed(Protocol):
    """A `Policy` or `Scorer` where it computes: DeepSpeed's engine, or a `frozen` copy."""

    @property
    def module(self) -> Any:
        """The model itself."""

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """What the model's ``forward`` gives."""

    def eval(self) -> Any:
        """Begin to generate."""

    def train(self) -> Any:
        """Have generated."""

    def zero_optimization_stage(self) -> int:
        """The stage in which its weights are partitioned."""

    @property
    def optimizer(self) -> Any:
        """Knows under ZeRO-3 where the weights are."""


class Policy(nn.Module):
    """A causal language model whose forward gives the log-probs of the answers.

    Args:
        lm: the language model.
        logprob_chunk: answer tokens whose logits are computed at a time; 0: all.

    Attributes:
        lm: the language model, in peft's wrapper when it has adapters.
        generation_config: the checkpoint's own, which the saved model gets again.
    """

    def __init__(self, lm: PreTrainedModel, logprob_chunk: int = 0):
        super().__init__()
        self.lm = lm
        self.logprob_chunk = logprob_chunk
        self.generation_config = lm.generation_config
        self._arguments = _arguments(lm)

    @property
    def inner(self) -> PreTrainedModel:
        """The Hugging Face model, in peft's wrapper when it has adapters."""
        return self.lm

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None,
        answer_width: int,
        temperature: float,
        loss: chunks.Loss | None = None,
        begins: Tensor | None = None,
    ) -> Tensor:
        """Log-probs of the answer tokens, or a loss of them.

        Args:
            sequences: [b, t], each a prompt and its answer.
            attention_mask: [b, t]; None where padding stands on the right alone, which no token
                of a text sees.
            answer_width: r.
            temperature: the one that the answers were sampled with.
            loss: makes [m] of log-probs. Where it is known here, the gradient in chunks costs no
                more than at once.
            begins: [b], the columns where answers begin; None: they are the last r columns.

        Returns:
            [b, r], fp32, no matter what where an answer has ended; [m] of a loss.
        """
        inputs = _inputs(self._arguments, sequences, attention_mask)
        places = _places(sequences, answer_width, begins)
        answers, before = sequences.gather(1, places[:, 1:]), places[:, :-1]
        plain = unwrapped(self.lm)
        head = plain.get_output_embeddings()
        if self.logprob_chunk:
            hidden = _at(before, plain.base_model(**inputs).last_hidden_state)
            if loss is not None and chunks.fits(head):
                size = self.logprob_chunk
                return chunks.apply(loss, hidden, head, answers, temperature, size)
            logprobs = self._logprobs_in_chunks(hidden, answers, temperature)
        else:
            # The head is not run on prompt tokens: on BLOOM 1.1B it is a third of a forward.
            with head.register_forward_pre_hook(lambda _, states: _at(before, *states)):
                logits = self.lm(**inputs).logits
            logprobs = formulas.token_logprobs(logits, answers, temperature, in_place=True)
        return logprobs if loss is None else loss(logprobs, slice(None))

    def _logprobs_in_chunks(self, hidden: Tensor, answers: Tensor, temperature: float) -> Tensor:
        """Log-probs from hidden states [b, r, h], with the logits of one chunk in memory at a time.

        Those of a backward pass are computed again: a fourth product with the head beside three.
        """
        head = unwrapped(self.lm).get_output_embeddings()

        def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
            # A bias would be added to a product of scattered rows in a tensor of its own.
            logits = head(states.contiguous())
            return formulas.token_logprobs(logits, tokens, temperature, in_place=True)

        parts = zip(
            torch.split(hidden, self.logprob_chunk, dim=1),
            torch.split(answers, self.logprob_chunk, dim=1),
            strict=True,
        )
        return torch.cat(
            [checkpoint(logprobs, *part, use_reentrant=False) for part in parts], dim=1
        )

    def next_logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        cache: Cache,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token that follows.

        Args:
            tokens: [b, n].
            attention_mask: [b, t].
            cache: of the tokens before; takes in these.
            columns: [n], where the tokens stand among t; None: they are the last.

        Returns:
            [b, v].
        """
        positions = _positions(self._arguments, attention_mask)
        for name, ids in positions.items():
            shown = ids[:, -tokens.shape[1] :] if columns is None else ids[:, columns]
            positions[name] = shown
        inputs = {
            "input_ids": tokens,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": True,
            **positions,
        }
        if "logits_to_keep" in self._arguments:
            inputs["logits_to_keep"] = 1
        logits: Tensor = self.lm(**inputs).logits
        return logits[:, -1]

    def generate(self, **arguments: Any) -> Tensor:
        """The language model's own ``generate``."""
        sequences: Tensor = self.lm.generate(**arguments)
        return sequences


class Head(nn.Linear):
    """A layer that makes a scalar of a hidden state, in fp32 whatever the weights are kept in.

    bf16 would round a value near 5 to the next 1/32.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Scalars [..., 1] of hidden states [..., h]."""
        bias = None if self.bias is None else self.bias.float()
        return linear(hidden.float(), self.weight.float(), bias)


class Scorer(nn.Module):
    """A sequence classifier with one label whose forward gives a scalar for every token.

    Args:
        classifier: the Hugging Face model.
        score_at: ``end`` or ``before_end``, the token at which it learnt to give a text's score.
    """

    def __init__(self, classifier: PreTrainedModel, score_at: str = "end"):
        super().__init__()
        self.classifier = classifier
        self.score_at = score_at
        self._arguments = _arguments(getattr(classifier, classifier.base_model_prefix))
        # The layer that is there, weights and all, with another forward.
        classifier.score.__class__ = Head

    @property
    def inner(self) -> PreTrainedModel:
        """The Hugging Face model, in peft's wrapper when it has adapters."""
        return self.classifier

    @property
    def head(self) -> nn.Module:
        """The layer that makes a scalar of a hidden state."""
        head: nn.Module = unwrapped(self.classifier).score
        return head

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None,
        answer_width: int,
        head: nn.Module | None = None,
        begins: Tensor | None = None,
    ) -> Tensor:
        """Scalars at the answer tokens and at the one before them.

        Args:
            sequences: [b, t], each a prompt and its answer.
            attention_mask: [b, t]; None where padding stands on the right alone, which no token
                of a text sees.
            answer_width: r.
            head: takes the place of the model's own.
            begins: [b], the columns where answers begin; None: they are the last r columns.

        Returns:
            [b, r + 1], fp32, no matter what where an answer has ended. As values, entries 0 … r-1
            are the estimates before each answer token; as scores, entries 1 … r are those after it.
        """
        classifier = unwrapped(self.classifier)
        backbone = getattr(classifier, classifier.base_model_prefix)
        inputs = _inputs(self._arguments, sequences, attention_mask)
        places = _places(sequences, answer_width, begins)
        hidden = _at(places, backbone(**inputs).last_hidden_state)
        scores: Tensor = (head or self.head)(hidden).squeeze(-1)
        return scores


class Parameters(NamedTuple):
    """Numbers in a model's weights: those that train, and all."""

    trainable: int
    total: int


def parameters(model: nn.Module) -> Parameters:
    """The parameters of a model, partitioned by ZeRO-3 or not."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return Parameters(
        trainable=sum(count for count, trains in counts if trains),
        total=sum(count for count, _ in counts),
    )


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The Hugging Face model under peft's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(
    arguments: frozenset[str], sequences: Tensor, attention_mask: Tensor | None
) -> dict[str, Any]:
    """What a model is given to read whole texts."""
    positions = {} if attention_mask is None else _positions(arguments, attention_mask)
    mask = {"attention_mask": attention_mask}
    return {"input_ids": sequences, "use_cache": False, **mask, **positions}


def _positions(arguments: frozenset[str], attention_mask: Tensor) -> dict[str, Tensor]:
    """Position ids for a model that takes them, padding not counted; ALiBi reads the mask.

    Padding has the first: after a row as long as the model can read, there is no next one.
    """
    if "position_ids" not in arguments:
        return {}
    counted = attention_mask.long()
    return {"position_ids": (counted.cumsum(-1) - counted) * counted}


def _places(sequences: Tensor, answer_width: int, begins: Tensor | None) -> Tensor:
    """[b, r + 1], columns of the answers and of the token before them, none beyond the last."""
    width = sequences.shape[1]
    if begins is None:
        begins = sequences.new_full(sequences.shape[:1], width - answer_width)
    steps = torch.arange(-1, answer_width, device=sequences.device)
    return (begins.unsqueeze(-1) + steps).clamp(max=width - 1)


def _at(places: Tensor, states: Tensor) -> Tensor:
    """[b, r, h] of states [b, t, h], those of each row at its places [b, r]."""
    rows = torch.arange(len(states), device=states.device).unsqueeze(-1)
    picked = (places + rows * states.shape[1]).flatten()
    return states.flatten(0, 1).index_select(0, picked).view(*places.shape, -1)


def _arguments(model: PreTrainedModel) -> frozenset[str]:
    """What the forward of a model takes; to look takes longer than a small layer."""
    return frozenset(inspect.signature(type(model).forward).parameters)
