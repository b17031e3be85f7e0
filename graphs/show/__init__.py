"""A block graph shown: as text, as a picture, and as plain values for JSON. Nothing that runs a graph imports this."""
