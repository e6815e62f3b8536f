"""Packets from NFQUEUE to a verdict."""
