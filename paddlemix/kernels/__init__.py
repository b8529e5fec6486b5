"""Hand-written kernels, each behind a function with a plain Paddle equivalent elsewhere."""
