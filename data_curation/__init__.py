"""Scores, reweights, tags and filters pretraining text by the emotional regulation that it models."""
