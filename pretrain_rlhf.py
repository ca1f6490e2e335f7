"""RLHF (PPO) on Megatron-Core and vLLM.

    torchrun --nproc-per-node 2 pretrain_rlhf.py --actor-model DIR --reward-model DIR \
        --prompt-data FILE <Megatron flags>

`--help` lists all flags; the groups rlhfuse, rollout, critic and ppo are this program's own.
"""

from megatron_rlhfuse.arguments import parse_arguments


def main() -> None:
    args = parse_arguments()
    from megatron_rlhfuse.trainer import Trainer  # after Megatron is made ready for this machine

    with Trainer(args) as trainer:
        for iteration in trainer.iterations():
            prompts = trainer.next_prompts(iteration)
            trainer.generate(iteration, prompts)
            scored = trainer.infer(iteration, prompts)
            trainer.train(iteration, scored)
            trainer.publish_weights(iteration)
            trainer.record(iteration)


# A process that a library spawns imports this file again: without the guard it would train.
if __name__ == "__main__":
    main()
