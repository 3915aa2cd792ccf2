"""Processes that are killed at random moments, and what must hold afterwards, for tools/crash_test.py."""
