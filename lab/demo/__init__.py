"""Demonstrations: throw-away hosts, real packets, policies that the reader may change."""
