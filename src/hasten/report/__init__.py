"""What was found, for people: terminal tables, one HTML page."""
