"""Generation: vLLM engines in child processes, fed with weights by the trainer and with prompts
by the rollout stage, and the samples that come back."""
