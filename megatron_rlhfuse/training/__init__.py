"""Actor and critic in training: batches, losses on Megatron schedules, checkpoints."""
