"""Helpers that know nothing of SQUID, open to every room."""
