"""PDML: scene parsing from labelled points, with a distance metric across images. See README.md here."""
