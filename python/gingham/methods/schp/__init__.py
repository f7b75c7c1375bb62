"""SCHP: Self-Correction for Human Parsing, https://arxiv.org/abs/1910.09777. See README.md here."""
