"""Commands for InternVL-Chat-LLaVA."""
