"""Default prompt, actions and length of a video."""

DEFAULT_PROMPT = "a red robot in a snowy forest by day"  # for named models; untrained ones cannot follow it
DEFAULT_BLOCKS = 3
DEFAULT_ACTIONS = "6R 4D 6L 4U"  # for a model with actions if no length is given: a walk back to the start
