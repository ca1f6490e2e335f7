"""The algorithms of RLHF as pure tensor functions: KL, rewards, advantages, losses, statistics."""
