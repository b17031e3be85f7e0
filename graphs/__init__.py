"""The block as data: which passes it makes, and which frames each group of a pass reads and writes."""
