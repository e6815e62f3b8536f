"""What may be said on an allowed connection."""
