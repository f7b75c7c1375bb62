"""One-shot domain adaptation for person re-identification: one labelled picture of every person. See README.md here."""
