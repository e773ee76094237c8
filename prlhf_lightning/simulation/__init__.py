"""Simulated users, and the small language in which they judge answers."""
