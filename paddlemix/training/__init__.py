"""Fine-tuning: arguments, building and freezing a model, the optimiser over many processes, checkpoints, the loop."""
