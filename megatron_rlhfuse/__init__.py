"""RLHF (PPO) on stock Megatron-Core and stock vLLM, built for stage fusion."""
