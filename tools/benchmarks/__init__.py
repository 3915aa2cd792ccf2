"""Speed of converted models, compared with baselines of equal weight bytes and with the hardware limit."""

from tnnlm.machine.threads import share_cores

share_cores()  # before any module of this folder imports torch, as the commands do
