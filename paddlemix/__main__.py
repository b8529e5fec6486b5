"""`python -m paddlemix` is the console command."""

from paddlemix.commands import main

main()
