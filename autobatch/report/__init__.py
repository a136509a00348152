"""Records to lines of text; prints nothing."""
