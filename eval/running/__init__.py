"""A run from its flags and inputs to its result files."""
