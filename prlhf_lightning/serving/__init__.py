"""An OpenAI-compatible server that writes for each person, and collects what they think of it."""
