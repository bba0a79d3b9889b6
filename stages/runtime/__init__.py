"""How a stage starts, resumes and ends. Nothing here decides a byte of an output."""
