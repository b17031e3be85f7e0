"""Text encoders: a prompt in, rows of features out."""
