"""Pipeline schedules of several models on the same devices: problems, plans, bounds, search.

PURE: no torch.distributed, no Megatron, no vLLM; a clock only where a search has a budget of
seconds. The search itself is C++ (`csrc/planner/`).
"""
