"""What is refused or said before anything runs."""
