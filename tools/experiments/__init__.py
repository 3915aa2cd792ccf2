"""Experiments that test the claims of the papers; `tools/reproduce.py` runs them and writes their pages."""

from tnnlm.machine.threads import share_cores

share_cores()  # before any module of this folder imports torch, as the commands do
