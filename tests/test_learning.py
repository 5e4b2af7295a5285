"""Whole runs on a task whose best policy is known, see `echo`: how fast and how far they learn.

Bounds stand well outside of what ten seeds showed; the figures are in docs/learning.md.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

import echo  # noqa: E402
from ranks import train  # noqa: E402

from hlrlhf.settings import layers  # noqa: E402

Metrics = list[dict[str, Any]]

KL_COEFFICIENT = 0.1
BEST = echo.best(KL_COEFFICIENT)
SEEDS = range(1, 6)
EARLY = slice(20, 30)  # steps
LATE = slice(50, 60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[float, int], Metrics]:
    """The metrics of five seeds, and of the first with other KL coefficients, by both."""
    models = tmp_path_factory.mktemp("echo")
    echo.make(models)

    def metrics(run: tuple[float, int]) -> Metrics:
        kl_coefficient, seed = run
        directory = models / f"{kl_coefficient:g}-{seed}"
        directory.mkdir()
        flags = echo.flags(models, directory, seed, kl_coefficient)
        settings = layers.dump(layers.resolve(environ={}, flags=flags))
        (directory / "settings.yaml").write_text(settings, encoding="utf-8")
        trained = train(directory)
        assert trained.codes == [0], trained.output
        return trained.metrics

    chosen = [(KL_COEFFICIENT, seed) for seed in SEEDS] + [(0.0, 1), (1.0, 1)]
    with ThreadPoolExecutor(2) as two:
        return dict(zip(chosen, two.map(metrics, chosen), strict=True))


def mean(metrics: Metrics, name: str, steps: slice = LATE) -> float:
    return fmean(values[name] for values in metrics[steps])


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_finds_the_best_policy(
    runs: dict[tuple[float, int], Metrics], seed: int
) -> None:
    metrics = runs[KL_COEFFICIENT, seed]
    assert mean(metrics, "reward", slice(1)) < 0.3
    assert mean(metrics, "reward", EARLY) > 0.9 * BEST.reward
    assert mean(metrics, "reward") == pytest.approx(BEST.reward, rel=0.1)
    # A penalty of 0.08 or 0.13 would move the reward by over 12 %, and the divergence by over 30 %.
    assert mean(metrics, "kl") == pytest.approx(BEST.kl, rel=0.3)
    # Near the best policy this is flat: half or twice the penalty would end under 86 %.
    objective = mean(metrics, "reward") - KL_COEFFICIENT * mean(metrics, "kl")
    assert objective > 0.93 * (BEST.reward - KL_COEFFICIENT * BEST.kl)
    # Without a penalty it ends at 1.99 times as much.
    assert max(values["kl"] for values in metrics) < 1.9 * BEST.kl


@pytest.mark.parametrize("seed", SEEDS)
def test_the_critic_foresees_the_returns(runs: dict[tuple[float, int], Metrics], seed: int) -> None:
    metrics = runs[KL_COEFFICIENT, seed]
    assert abs(mean(metrics, "explained_variance", slice(1))) < 0.1
    assert mean(metrics, "explained_variance") > 0.5


@pytest.mark.knob("ppo.kl_coefficient")
def test_a_larger_kl_coefficient_ends_nearer_to_the_reference(
    runs: dict[tuple[float, int], Metrics],
) -> None:
    free, middle, held = (mean(runs[beta, 1], "kl") for beta in (0.0, KL_COEFFICIENT, 1.0))
    assert free > 0.9 * echo.best(0).kl
    assert 0.5 * free > middle * 0.8
    assert held < 0.1 * middle
