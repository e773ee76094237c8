"""The commands of `python -m prlhf_lightning`."""
