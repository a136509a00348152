"""Probers without hardware."""
