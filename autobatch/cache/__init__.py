"""Plans kept for the next time the same is asked."""
