"""Personalized RLHF on PyTorch Lightning: one policy, many users, learned from who preferred which answer."""

__version__ = "0.1.0"
