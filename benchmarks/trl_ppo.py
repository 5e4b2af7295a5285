"""TRL's PPO trainer on the models, prompts and settings of an hlrlhf run.

    python benchmarks/trl_ppo.py RUN_DIRECTORY [--without-collections]

Everything that both trainers have comes from the run's ``settings.yaml``; what TRL has besides is
set as its documentation does. Each step's mean score and KL divergence, its seconds and the peak of
memory go to ``trl.jsonl`` in the run directory, under the names that ``metrics.jsonl`` has for
them. OMP_NUM_THREADS says how many threads compute. TRL's loop calls ``gc.collect`` several times a
step, which small models feel most: --without-collections lets it do nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from hlrlhf.runs import Run
from hlrlhf.settings import Settings
from hlrlhf.settings.layers import load

# TRL's names for what metrics.jsonl records.
NAMES = {"objective/scores": "reward", "objective/kl": "kl"}


class Record(TrainerCallback):
    """Appends each step's numbers to a file."""

    def __init__(self, path: Path, rows: int):
        self._file = path.open("w", encoding="utf-8")
        self._rows = rows
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called once a step."""
        values = {ours: logs[theirs] for theirs, ours in NAMES.items()}
        now = time.perf_counter()
        values |= {"seconds": now - self._began, "peak_memory_bytes": peak_memory()}
        self._began = now
        step = logs["episode"] // self._rows
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()


def peak_memory() -> int:
    """Bytes, as our own trainer counts them on processors."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def config(settings: Settings, prompts: int, output: str) -> PPOConfig:
    """The same algorithm in TRL's words, for one device and `prompts` prompts.

    Raises:
        AssertionError: the run asks for what TRL's trainer does not do.
    """
    # TRL's loop clips no gradients and no scores; it averages losses micro batch by micro batch, so
    # that what is learnt is comparable only where there is one.
    assert settings.world_size == 1
    assert settings.optimizer.gradient_clipping == 0
    assert settings.actor.learning_rate == settings.critic.learning_rate
    assert settings.actor.weight_decay == settings.critic.weight_decay == 0
    assert settings.generation.top_p == 1
    assert settings.generation.top_k == 0
    assert settings.ppo.kl_controller == "fixed"
    assert settings.ppo.whiten_advantages
    steps = settings.epochs * prompts // settings.gbs
    if settings.run_steps:
        steps = min(steps, settings.run_steps)
    return PPOConfig(
        output_dir=output,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        bf16=settings.dtype == "bf16",
        per_device_train_batch_size=settings.mbs,
        # It generates as many at a time as it scores; all at once is what it does by itself.
        local_rollout_forward_batch_size=settings.gbs,
        gradient_accumulation_steps=settings.gbs // settings.mbs,
        num_mini_batches=settings.ppo.minibatches,
        num_ppo_epochs=settings.ppo.epochs,
        total_episodes=steps * settings.gbs,
        response_length=settings.generation.max_new_tokens,
        temperature=settings.generation.temperature,
        stop_token="eos",
        learning_rate=settings.actor.learning_rate,
        lr_scheduler_type=settings.optimizer.lr_scheduler,
        warmup_steps=settings.num_warmup_steps,
        adam_beta1=settings.optimizer.beta1,
        adam_beta2=settings.optimizer.beta2,
        adam_epsilon=settings.optimizer.epsilon,
        weight_decay=settings.actor.weight_decay,
        kl_coef=settings.ppo.kl_coefficient,
        kl_estimator=settings.ppo.kl_estimator,
        cliprange=settings.ppo.clip_range,
        cliprange_value=settings.ppo.value_clip_range,
        gamma=settings.ppo.gamma,
        lam=settings.ppo.gae_lambda,
        # One optimizer steps both losses of TRL's: 1 gives the critic the weight that it has here.
        vf_coef=1.0,
        whiten_rewards=False,
        missing_eos_penalty=None,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )


def train(run: Path) -> None:
    """Train on the run's models and prompts, from where the run itself started."""
    settings = load(Run(run).settings_file)
    actor, critic = settings.actor.model_path, settings.critic.model_path
    reward = settings.reward.model_path or critic
    tokenizer = AutoTokenizer.from_pretrained(actor, padding_side="left")
    (path,) = settings.dataset.path
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    prompts = Dataset.from_list(
        [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]
    )

    def scorer(folder: str) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    with tempfile.TemporaryDirectory() as output:
        PPOTrainer(
            args=config(settings, len(prompts), output),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(actor),
            ref_model=AutoModelForCausalLM.from_pretrained(actor),
            reward_model=scorer(reward),
            value_model=scorer(critic),
            train_dataset=prompts,
            eval_dataset=prompts.select(range(settings.gbs)),
            callbacks=[Record(run / "trl.jsonl", settings.gbs)],
        ).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--without-collections", action="store_true")
    asked = parser.parse_args()
    if asked.without_collections:
        gc.collect = lambda *_: 0  # type: ignore[assignment]
    train(asked.run)
