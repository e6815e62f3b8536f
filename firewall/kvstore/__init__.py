"""Where identities are agreed on: a small protocol and its backends."""
