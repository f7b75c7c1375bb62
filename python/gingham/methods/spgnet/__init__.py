"""SPGNet: Semantic Prediction Guidance for Scene Parsing, https://arxiv.org/abs/1908.09798. See README.md here."""
