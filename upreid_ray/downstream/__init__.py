"""What a backbone is for: scores, comparisons, files for other tools."""
