"""Decoding schemes as plain data: presets, context policies, the timeline, actions and storyboards. No torch."""
