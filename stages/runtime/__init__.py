"""How a stage starts, goes on after a kill, and ends. Nothing here decides a byte of an output."""
