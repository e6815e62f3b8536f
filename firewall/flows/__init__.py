"""One record per decision, compatible with Hubble."""
