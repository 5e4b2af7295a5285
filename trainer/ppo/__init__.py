"""PPO: rollout, experience, update, and the formulas."""
