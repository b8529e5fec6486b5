"""A retrieval model of drawn scenes: how the bundled one was made, and what it is for."""
