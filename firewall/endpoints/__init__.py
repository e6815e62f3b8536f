"""The hosts that Bartizan manages, and their life cycle."""
