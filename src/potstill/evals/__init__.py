"""What a student is worth, measured on rows it has not seen."""
