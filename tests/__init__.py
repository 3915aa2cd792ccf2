"""Tests of tnnlm: a folder for every package of it, and `support` for what they share."""
