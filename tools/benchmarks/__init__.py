"""Speed of converted models, compared with baselines of equal weight bytes and with the hardware limit."""
