"""Statistics of preference data, small preference models, and judges of answers."""
