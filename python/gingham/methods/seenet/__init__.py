"""SeeNet: attention on whole objects from image-level labels, by erasing what was found. See README.md here."""
