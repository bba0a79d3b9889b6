"""The report's figures and its page."""
