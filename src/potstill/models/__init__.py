"""Hugging Face checkpoints, read whole or refused; what teachers and students both stand on."""
