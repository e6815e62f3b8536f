"""The control plane: knows endpoints, identities, policies; publishes snapshots."""
