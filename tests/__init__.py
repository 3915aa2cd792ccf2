"""Tests of tnnlm: one folder per package, and `support` with shared helpers."""
