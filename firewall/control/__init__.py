"""How the agent and its workers talk."""
