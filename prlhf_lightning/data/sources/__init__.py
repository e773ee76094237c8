"""Where raw feedback comes from, one file a source."""
