"""A capture, played through parser, tracker and policy with its own time as the clock."""
