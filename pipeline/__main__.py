"""`python -m pipeline` is the command line."""

from pipeline.cli.main import main

main()
