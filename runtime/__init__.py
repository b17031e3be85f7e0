"""The block runtime: schedule, noise, context policy, cache, sessions and the engine that drives them."""
