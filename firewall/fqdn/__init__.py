"""What DNS answered, and which addresses names may lead to."""
