"""Four card games after Gym Cards (RL4VLM, arXiv:2405.10292): NumberLine, EZPoints, Points24, Blackjack."""
