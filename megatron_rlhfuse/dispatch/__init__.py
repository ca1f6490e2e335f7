"""Who computes which samples: RLHF batches are ragged, so how they are dealt out decides how long a
step takes. Pure, with its inner loops in C++ (`csrc/dispatch/`)."""
