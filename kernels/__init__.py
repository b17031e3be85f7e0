"""Plain references of the operations that models share; each later kernel is tested against the one here."""
