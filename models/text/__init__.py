"""Text encoders: from a prompt to rows of features [text_len, text_dim]."""
