"""What was answered, and how good it is."""
