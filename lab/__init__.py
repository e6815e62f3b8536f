"""Throw-away hosts: namespaces, links and processes that leave no trace."""
