"""Conversations as rows of tokens of which the answers are scored, for supervised fine-tuning."""
