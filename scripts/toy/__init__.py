"""Parts of scripts/make_toy_models.py: text and its hidden rule, tokenizer, training, sampling."""
