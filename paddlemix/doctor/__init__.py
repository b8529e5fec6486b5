"""What a machine can run: a report on it, and checks of its card, operator by operator."""
