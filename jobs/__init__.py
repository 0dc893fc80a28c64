"""What the package is run for: each module is a command."""
