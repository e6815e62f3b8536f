"""Bartizan: who may talk to whom."""
