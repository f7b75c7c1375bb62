"""DaP: Drop-and-Pick training, https://arxiv.org/abs/1811.09347."""
