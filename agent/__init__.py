"""Learning: rollouts, advantages, losses, the PPO trainer, checkpoints and figures."""
