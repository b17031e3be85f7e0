"""Serving: one engine behind HTTP and WebSocket, for a browser and for programs."""
