"""Decoding many sequences at once, each with its own length, sampling, pictures and adapter.

``pages`` (which memory holds whose keys and values) and ``scheduler`` (what runs next) are plain data without Paddle;
``step`` is the model's part, ``sampling`` chooses tokens, ``tower`` computes pictures a slice at a time, and ``loop`` drives
them all: a list of sequences goes in, their tokens come out. ``batch_chat``, evaluation and the server each turn that loop.
"""
