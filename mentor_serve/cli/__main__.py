"""`python -m mentor_serve.cli`."""

from mentor_serve.cli.application import main

main()
