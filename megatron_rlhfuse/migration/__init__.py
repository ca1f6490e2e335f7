"""Migration of a rollout's long tail: when, which samples, from where to where; and its simulation.

PURE: no torch, no vLLM, no Megatron, no clock, no files but those of the command.
"""
