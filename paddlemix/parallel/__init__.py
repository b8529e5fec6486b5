"""Several processes that compute one model: groups of ranks and their collectives, and ranks that a process starts itself.

Nothing here knows a model. How layers are divided: :mod:`paddlemix.models.blocks.parallel`.
"""
