"""Anything that holds images -> records."""
