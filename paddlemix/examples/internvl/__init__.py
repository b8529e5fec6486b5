"""Commands of InternVL-C and -G: each is thin, and its --help says what it does."""
