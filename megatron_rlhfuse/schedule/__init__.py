"""Pipeline schedules of several models on the same devices: problems, plans, bounds, search.

PURE: no torch.distributed, no Megatron, no clock. The search itself is C++ (`csrc/`).
"""
