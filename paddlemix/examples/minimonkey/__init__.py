"""Commands of Mini-Monkey."""
