"""Commands to run and read; each is thin and calls the rooms above."""
