"""From files to token rows and bins."""
