"""Hugging Face's Trainer for any model: averaging, resuming, stopping, showing; it knows no
family."""
