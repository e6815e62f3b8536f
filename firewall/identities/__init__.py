"""Labels, selectors, and the numbers that label sets get."""
