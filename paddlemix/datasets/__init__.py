"""Training data, one package a model family."""
