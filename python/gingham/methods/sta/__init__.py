"""STA: one vector for a clip of a person, by attention without parameters over parts and frames. See README.md here."""
