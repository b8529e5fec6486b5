"""Processors turn files into the arrays that a model reads; they need numpy and Pillow, never Paddle."""
