"""Programs that `rlhfuse doctor` starts: each tries one part of a job, or asks torch.

schedule.py      a published instance, planned in C++ and validated
dispatch.py      compiled dispatch and packing against plain Python
collectives.py   all-reduce of the ranks that torchrun starts; its ranks are collectives_rank.py
training.py      a training step of a tiny GPT in Megatron
generation.py    a vLLM engine that gets weights and answers
tiny_model.py    the model of both, whose answers are known
facts.py         what torch says of this machine

A module has `run(folder)`, which returns what was found, and raises where something is wrong.
Nothing heavy is imported before `run`.
"""
