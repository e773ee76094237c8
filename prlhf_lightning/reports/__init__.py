"""HTML pages and JSON about data and trained models."""
