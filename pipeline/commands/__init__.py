"""What the commands do: a module each, used by the command line and by Python."""
