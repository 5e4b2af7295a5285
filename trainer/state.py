"""Everything of a run that changes while it trains, through one door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hlrlhf.trainer.decoding.choice import Chosen
from hlrlhf.trainer.formulas import KlController
from hlrlhf.trainer.models.optimizing import Optimizing
from hlrlhf.trainer.models.roles import Models
from hlrlhf.trainer.ppo.evaluation import Evaluation
from hlrlhf.trainer.ppo.guards import Guard
from hlrlhf.trainer.ppo.pretraining import Mix
from hlrlhf.trainer.ppo.rewards import Rewards


class Stateful(Protocol):
    """A member of the state."""

    def state(self) -> dict[str, Any]:
        """By name: what JSON can hold, the same on all ranks; or a `pieces.Piece` of a tensor."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, in which tensors are whole and `pieces.Readable`.

        All ranks have to call it.
        """


@dataclass
class State:
    """What a run is made of at a step, and what it has become by then.

    Attributes:
        models: actor, critic and the average change.
        rewards: their running normalisation does.
        kl: its coefficient does, if it is adaptive.
        mix: its place in the texts does; None without texts.
        guard: what it has counted.
        decoder: which one has been fallen back to.
        evaluation: the reference's answers.
        step: steps done.
    """

    models: Models
    rewards: Rewards
    kl: KlController
    mix: Mix | None
    guard: Guard
    decoder: Chosen
    evaluation: Evaluation
    step: int = 0

    def state(self) -> dict[str, dict[str, Any]]:
        """Of each member, by name."""
        members = {name: member.state() for name, member in self._members().items()}
        return {"run": {"step": self.step}} | members

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a state, see `Stateful.restore`.

        It may be of a run with other settings, that had no average and no texts: these begin here.
        """
        self.step = state["run"]["step"]
        for name, member in self._members().items():
            member.restore(state.get(name, {}))

    def _members(self) -> dict[str, Stateful]:
        members: dict[str, Stateful | None] = {
            "actor": Optimizing(self.models.actor),
            "critic": Optimizing(self.models.critic),
            "average": self.models.average,
            "rewards": self.rewards,
            "kl": self.kl,
            "mix": self.mix,
            "guard": self.guard,
            "decoder": self.decoder,
            "evaluation": self.evaluation,
            "random": self.models.device,
        }
        return {name: member for name, member in members.items() if member is not None}
