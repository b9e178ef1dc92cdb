"""`pipeline report`: runs, sweeps and tables as one HTML file."""
