"""CCNet: Criss-Cross Attention for Semantic Segmentation, https://arxiv.org/abs/1811.11721. See README.md here."""
