"""An OpenAI-compatible server: ``protocol`` (what a request may say), ``media`` (pictures and clips from outside), ``prompts``
(messages to a prompt), ``engine`` (the thread that owns the model), ``api`` (HTTP), ``cli`` (a terminal client)."""
