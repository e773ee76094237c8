"""Files, hashing, progress bars, and other helpers without a part of their own."""
