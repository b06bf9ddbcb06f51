"""Readers, one per format of data."""
