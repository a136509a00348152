"""The rules, pure: the standard library alone."""
