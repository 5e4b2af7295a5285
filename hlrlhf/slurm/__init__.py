"""Slurm: the batch script, the commands, the states."""
