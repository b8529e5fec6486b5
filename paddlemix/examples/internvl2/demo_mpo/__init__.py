"""A wrong habit of the demo model, lost by preference training."""
