"""Commands for the InternVL chat models."""
