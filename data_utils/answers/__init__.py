"""Finished answers of other tools, written as the published files."""
