"""SG-One: one-shot segmentation guided by the similarity with a masked support image. See README.md here."""
