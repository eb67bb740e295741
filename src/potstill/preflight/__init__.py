"""What is checked, planned and measured before any hour is spent."""
