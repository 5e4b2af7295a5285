"""RLHF (PPO) on a Slurm cluster from one command."""

__version__ = "0.1.0"
