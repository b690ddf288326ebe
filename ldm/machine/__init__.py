"""Memory and cores that this process shares with others."""
