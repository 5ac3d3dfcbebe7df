"""What results are measured by, each with its field's own scorer."""
