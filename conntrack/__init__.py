"""Connection tracking in pure Python: parse packets, follow flows, know what is a reply."""
