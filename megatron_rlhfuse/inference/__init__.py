"""Scoring finished samples: reference and actor log-probabilities, values, rewards."""
