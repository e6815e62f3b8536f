"""The `bartizan` command."""
