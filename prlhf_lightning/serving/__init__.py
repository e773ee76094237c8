"""An OpenAI-compatible server that generates for each user and collects feedback."""
