"""The command line: its commands, options and what it prints."""
