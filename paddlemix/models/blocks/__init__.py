"""What the families share: the vision tower, one decoder with settings, layers, generation, sessions, LoRA, the CPU engine."""
