"""Actor, critic, reference and reward models from Hugging Face folders, and back.

hf_config.py    a folder's config.json -> ModelShape -> Megatron arguments
build.py        Megatron arguments -> GPTModel on this rank, with a language or a scalar head
convert.py      PURE: which Hugging Face tensors live in which Megatron parameter, and where
load.py         safetensors, or a stream of tensors, -> this rank's parameters
export.py       parameters of all ranks -> a stream of whole Hugging Face tensors
save.py         such a stream -> a folder that transformers and vLLM load
logits.py       log-probabilities and entropy of tokens from logits split over tensor ranks
scalar_head.py  the output layer of critic and reward model
"""
