"""TRL's SFT, DPO and KTO around a policy, their data, and what the model forgets."""
