"""Jobs: a run, started and watched, by Slurm or on this machine."""
