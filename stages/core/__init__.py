"""What several stages share; each module is one thing."""
