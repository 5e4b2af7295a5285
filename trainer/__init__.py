"""The PPO trainer: one process per device."""
