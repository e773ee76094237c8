"""The commands of `prlhf-lightning`."""
